//! `sluice top`: live rates of services.

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use super::Outcome;
use super::conntrack::time;
use super::table::{Style, Table, When, cut, whole};
use crate::node::view::View;
use crate::tools::top::screen::{Next, Order, Screen, bytes, number};
use crate::tools::top::{Change, Sample};

/// The most services, and reasons, in one table.
const ROWS: usize = 30;

#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// Sample the counters this often.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = interval)]
    interval: Duration,
    /// Sort services by this figure at first.
    #[arg(long, value_enum, default_value_t, value_name = "FIGURE")]
    sort: Order,
    /// Print one table with the rates of one interval, and exit.
    #[arg(long)]
    once: bool,
    /// Print that table without headers.
    #[arg(long, requires = "once")]
    no_headers: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let shortest = Duration::from_millis(200);
    match time(text)? {
        time if time < shortest => Err("the shortest interval is 200ms".to_owned()),
        time => Ok(time),
    }
}

fn sample(pin_path: &Path) -> anyhow::Result<Sample> {
    let view = View::read(pin_path)?;
    Sample::of(&view, Instant::now())
}

/// Shows the rates until the user quits, or prints them once.
///
/// # Errors
///
/// Fails if the maps cannot be read at the start, or the terminal cannot be used.
pub(super) fn run(args: &TopArgs, pin_path: &Path) -> anyhow::Result<Outcome> {
    let first = sample(pin_path)?;
    if args.once || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        std::thread::sleep(args.interval);
        let mut screen = Screen::new(args.sort);
        screen.show(Change::between(&first, &sample(pin_path)?));
        return Ok(text(&screen, Style::new(When::Never, !args.no_headers)).into());
    }
    let mut terminal = ratatui::try_init().context("cannot use the terminal; try --once")?;
    let result = watch(&mut terminal, args, first, pin_path);
    ratatui::restore();
    result.map(|()| Outcome::default())
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    args: &TopArgs,
    first: Sample,
    pin_path: &Path,
) -> anyhow::Result<()> {
    let mut screen = Screen::new(args.sort);
    screen.show(Change::between(&first, &first));
    let mut before = first;
    let mut due = Instant::now() + args.interval;
    loop {
        let _ = terminal.draw(|frame| screen.draw(frame)).context("cannot draw")?;
        if event::poll(due.saturating_duration_since(Instant::now()))
            .context("cannot wait for keys")?
        {
            if let Event::Key(key) = event::read().context("cannot read keys")?
                && key.kind != KeyEventKind::Release
                && screen.press(key) == Next::Quit
            {
                return Ok(());
            }
            continue;
        }
        due = Instant::now() + args.interval;
        // An agent may be being replaced, or a cleanup be under way: the last figures stay.
        match sample(pin_path) {
            Ok(after) => {
                screen.show(Change::between(&before, &after));
                before = after;
            }
            Err(error) => screen.fail(format!("{error:#}")),
        }
    }
}

/// Returns the screen as tables.
fn text(screen: &Screen, style: Style) -> String {
    let mut services = Table::new(&[
        cut("SERVICE"),
        whole("PORT"),
        whole("FAMILY"),
        whole("PKT/S"),
        whole("BYTE/S"),
        whole("CONN/S"),
        whole("FAIL/S"),
        whole("RST/S"),
    ]);
    let change = screen.change();
    for ((name, family), rates) in change.services.iter().take(ROWS) {
        services.row([
            format!("{}/{}", name.namespace, name.service),
            format!("{}/{}", name.port, name.protocol),
            format!("IPv{family}"),
            number(rates.packets),
            bytes(rates.bytes),
            number(rates.connections),
            number(rates.failed),
            number(rates.resets),
        ]);
    }
    let mut causes = Table::new(&[whole("REASON"), cut("SERVICE"), whole("PER S"), whole("ALL")]);
    for ((reason, of), count, rate) in change.causes.iter().take(ROWS) {
        let of = of.as_ref().map(|(namespace, name)| format!("{namespace}/{name}"));
        causes.row([
            (*reason).to_owned(),
            of.unwrap_or_default(),
            number(*rate),
            count.to_string(),
        ]);
    }
    let left = change.services.len().saturating_sub(ROWS);
    let more = if left == 0 { String::new() } else { format!("and {left} more\n") };
    let causes =
        if change.causes.is_empty() { String::new() } else { format!("\n{}", causes.text(style)) };
    services.text(style) + &more + &causes
}
