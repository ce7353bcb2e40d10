//! The screen of `sluice top`, and its keys.

use std::cmp::Ordering;

use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Row, Table, TableState};

use super::{Change, Rates, Service};
use crate::tools::units::binary;

/// The order of services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Order {
    /// Bytes per second.
    #[default]
    Bytes,
    /// Packets per second.
    Packets,
    /// Connections per second.
    Connections,
    /// Namespace and name.
    Name,
}

/// The effect of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Continue.
    Stay,
    /// Quit.
    Quit,
}

/// The state of the screen.
#[derive(Debug, Default)]
pub(crate) struct Screen {
    change: Change,
    order: Order,
    reversed: bool,
    /// The chosen service. It stays chosen wherever it moves to.
    chosen: Option<Service>,
    /// The reason why there are no new figures.
    problem: Option<String>,
}

impl Screen {
    /// Makes an empty screen.
    pub(crate) fn new(order: Order) -> Self {
        Self { order, ..Self::default() }
    }

    /// Returns the figures, in the chosen order.
    pub(crate) fn change(&self) -> &Change {
        &self.change
    }

    /// Shows new figures.
    pub(crate) fn show(&mut self, change: Change) {
        self.change = change;
        self.problem = None;
        self.sort();
        if self.chosen.as_ref().is_none_or(|chosen| self.place(chosen).is_none()) {
            self.chosen = self.change.services.first().map(|(service, _)| service.clone());
        }
    }

    /// Shows why there are no new figures.
    pub(crate) fn fail(&mut self, problem: String) {
        self.problem = Some(problem);
    }

    fn place(&self, service: &Service) -> Option<usize> {
        self.change.services.iter().position(|(found, _)| found == service)
    }

    fn sort(&mut self) {
        let (order, reversed) = (self.order, self.reversed);
        let compare = |a: &Rates, b: &Rates| match order {
            Order::Bytes => b.bytes.total_cmp(&a.bytes),
            Order::Packets => b.packets.total_cmp(&a.packets),
            Order::Connections => b.connections.total_cmp(&a.connections),
            Order::Name => Ordering::Equal,
        };
        let turned = |ordering: Ordering| if reversed { ordering.reverse() } else { ordering };
        self.change
            .services
            .sort_by(|a, b| turned(compare(&a.1, &b.1).then_with(|| a.0.cmp(&b.0))));
        for backends in self.change.backends.values_mut() {
            backends.sort_by(|a, b| turned(compare(&a.1, &b.1).then_with(|| a.0.cmp(&b.0))));
        }
    }

    fn sort_by(&mut self, order: Order) {
        self.order = order;
        self.sort();
    }

    fn walk(&mut self, step: isize) {
        let last = self.change.services.len().saturating_sub(1);
        let here = self.chosen.as_ref().and_then(|chosen| self.place(chosen)).unwrap_or_default();
        let there = here.saturating_add_signed(step).min(last);
        self.chosen = self.change.services.get(there).map(|(service, _)| service.clone());
    }

    /// Handles a key.
    pub(crate) fn press(&mut self, key: KeyEvent) -> Next {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return if key.code == KeyCode::Char('c') { Next::Quit } else { Next::Stay };
        }
        if matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
            return Next::Quit;
        }
        if let KeyCode::Char(letter) = key.code {
            match letter {
                'b' => self.sort_by(Order::Bytes),
                'p' => self.sort_by(Order::Packets),
                'c' => self.sort_by(Order::Connections),
                'n' => self.sort_by(Order::Name),
                'r' => {
                    self.reversed = !self.reversed;
                    self.sort();
                }
                'j' => self.walk(1),
                'k' => self.walk(-1),
                _ => {}
            }
        }
        for (code, step) in [
            (KeyCode::Down, 1),
            (KeyCode::Up, -1),
            (KeyCode::PageDown, 10),
            (KeyCode::PageUp, -10),
            (KeyCode::Home, isize::MIN),
            (KeyCode::End, isize::MAX),
        ] {
            if key.code == code {
                self.walk(step);
            }
        }
        Next::Stay
    }

    /// Draws everything.
    pub(crate) fn draw(&self, frame: &mut Frame<'_>) {
        let own = self.chosen.as_ref().and_then(|chosen| self.change.backends.get(chosen));
        // Services get half of the screen, the rest as much as it needs.
        let most = (frame.area().height / 4).max(4);
        let height = |rows: usize| u16::try_from(rows + 3).unwrap_or(u16::MAX).min(most);
        let [services, backends, causes, help] = frame.area().layout(&Layout::vertical([
            Constraint::Min(4),
            Constraint::Length(height(own.map_or(0, Vec::len))),
            Constraint::Length(height(self.change.causes.len())),
            Constraint::Length(1),
        ]));
        self.services(frame, services);
        self.backends(frame, backends);
        self.causes(frame, causes);
        let line = match &self.problem {
            Some(problem) => {
                Line::styled(problem.clone(), Style::new().add_modifier(Modifier::BOLD))
            }
            None => Line::from(vec![
                Span::raw("sort: "),
                self.key("b bytes", Order::Bytes),
                self.key("p packets", Order::Packets),
                self.key("c connections", Order::Connections),
                self.key("n name", Order::Name),
                Span::raw("r turned   \u{2191}\u{2193} choose   q quit"),
            ]),
        };
        frame.render_widget(line, help);
    }

    /// Returns a key's label. The active one is highlighted.
    fn key(&self, word: &str, order: Order) -> Span<'static> {
        let style = if self.order == order {
            Style::new().add_modifier(Modifier::BOLD)
        } else {
            Style::new()
        };
        Span::styled(format!("{word}  "), style)
    }

    fn services(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.change.services.iter().map(|((name, family), rates)| {
            let port = format!("{}/{}", name.port, name.protocol);
            let cells = [name.service(), port, format!("IPv{family}")];
            Row::new(cells.into_iter().chain(cells_of(rates)))
        });
        let widths = [
            Constraint::Min(16),
            Constraint::Length(10),
            Constraint::Length(6),
            Constraint::Length(9),
            Constraint::Length(7),
            Constraint::Length(7),
            Constraint::Length(8),
            Constraint::Length(8),
        ];
        let table = Table::new(rows, widths)
            .header(header([
                "SERVICE",
                "PORT",
                "FAMILY",
                "PACKETS/S",
                "BYTES/S",
                "CONNS/S",
                "FAILED/S",
                "RESETS/S",
            ]))
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
            .block(Block::bordered().title(format!(" Services ({}) ", self.change.services.len())));
        let mut state = TableState::new();
        state.select(self.chosen.as_ref().and_then(|chosen| self.place(chosen)));
        frame.render_stateful_widget(table, area, &mut state);
    }

    fn backends(&self, frame: &mut Frame<'_>, area: Rect) {
        let own = self.chosen.as_ref().and_then(|chosen| self.change.backends.get(chosen));
        let rows = own.into_iter().flatten().map(|(address, rates, serving)| {
            let state = if *serving { "serving" } else { "draining" };
            Row::new([address.clone(), state.to_owned()].into_iter().chain(cells_of(rates)))
        });
        let widths = [
            Constraint::Min(20),
            Constraint::Length(8),
            Constraint::Length(9),
            Constraint::Length(7),
            Constraint::Length(7),
            Constraint::Length(8),
            Constraint::Length(8),
        ];
        let of = self.chosen.as_ref().map(|(name, _)| format!(" of {name}"));
        let table = Table::new(rows, widths)
            .header(header([
                "BACKEND",
                "STATE",
                "PACKETS/S",
                "BYTES/S",
                "CONNS/S",
                "FAILED/S",
                "RESETS/S",
            ]))
            .block(Block::bordered().title(format!(" Backends{} ", of.unwrap_or_default())));
        frame.render_widget(table, area);
    }

    fn causes(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.change.causes.iter().map(|((reason, of), count, rate)| {
            let of = of.as_ref().map(|(namespace, name)| format!("{namespace}/{name}"));
            Row::new([
                (*reason).to_owned(),
                of.unwrap_or_else(|| "-".to_owned()),
                number(*rate),
                count.to_string(),
            ])
        });
        let widths = [
            Constraint::Length(24),
            Constraint::Min(20),
            Constraint::Length(10),
            Constraint::Length(12),
        ];
        let table = Table::new(rows, widths)
            .header(header(["REASON", "SERVICE", "PER S", "ALL"]))
            .block(Block::bordered().title(" Drops, rejects and other reasons "));
        frame.render_widget(table, area);
    }
}

fn header<const N: usize>(names: [&'static str; N]) -> Row<'static> {
    Row::new(names).style(Style::new().add_modifier(Modifier::BOLD))
}

fn cells_of(rates: &Rates) -> [String; 5] {
    [
        number(rates.packets),
        bytes(rates.bytes),
        number(rates.connections),
        number(rates.failed),
        number(rates.resets),
    ]
}

/// Formats a rate with few digits.
pub(crate) fn number(rate: f64) -> String {
    match rate {
        rate if rate >= 9_999_500.0 => format!("{:.0}M", rate / 1e6),
        rate if rate >= 9_999.5 => format!("{:.1}k", rate / 1e3),
        rate if rate >= 99.95 || rate.eq(&0.0) => format!("{rate:.0}"),
        rate => format!("{rate:.1}"),
    }
}

/// Formats a rate of bytes with few digits.
pub(crate) fn bytes(rate: f64) -> String {
    let (scaled, unit) = binary(rate);
    if unit.is_empty() || scaled >= 99.95 {
        format!("{scaled:.0}{unit}")
    } else {
        format!("{scaled:.1}{unit}")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::tests::{sample, service};
    use super::*;

    fn screen(order: Order) -> Screen {
        let at = Instant::now();
        let mut screen = Screen::new(order);
        screen.show(Change::between(&sample(at, 1), &sample(at, 2)));
        screen
    }

    fn drawn(screen: &Screen) -> String {
        drawn_at(100, screen)
    }

    fn drawn_at(columns: u16, screen: &Screen) -> String {
        let backend = TestBackend::new(columns, 24);
        let mut terminal = Terminal::new(backend).expect("a terminal in memory");
        let _ = terminal.draw(|frame| screen.draw(frame)).expect("drawing into memory");
        let rows = terminal.backend().buffer().content.chunks(columns.into());
        rows.map(|row| row.iter().map(ratatui::buffer::Cell::symbol).collect::<String>() + "\n")
            .collect()
    }

    fn press(screen: &mut Screen, code: KeyCode) -> Next {
        screen.press(KeyEvent::from(code))
    }

    #[test]
    fn services_backends_and_reasons_are_drawn_with_their_rates() {
        let text = drawn(&screen(Order::Bytes));
        let words = |word: &str| {
            let line = text.lines().find(|line| line.contains(word)).unwrap_or_default();
            line.split_whitespace().map(|word| word.trim_matches('│')).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(words("shop/web "), "shop/web 80/TCP IPv4 100 9.8Ki 10.0 5.0 0 ", "{text}");
        assert_eq!(words("10.0.0.1:80"), "10.0.0.1:80 serving 75.0 7.3Ki 7.5 4.0 0 ", "{text}");
        assert_eq!(words("10.0.0.2:80"), "10.0.0.2:80 draining 25.0 2.4Ki 2.5 1.5 0 ", "{text}");
        assert_eq!(words("no_backend_reset"), "no_backend_reset shop/gone 2.0 15 ", "{text}");
        assert!(text.contains("Backends of shop/web:80"), "{text}");
        assert!(text.contains("q quit"), "{text}");
    }

    #[test]
    fn every_figure_has_its_column_in_80() {
        let text = drawn_at(80, &screen(Order::Bytes));
        for name in ["PACKETS/S", "BYTES/S", "CONNS/S", "FAILED/S", "RESETS/S"] {
            assert_eq!(text.matches(name).count(), 2, "{name} of services and backends: {text}");
        }
    }

    #[test]
    fn keys_sort_turn_and_choose() {
        let first = |screen: &Screen| screen.change.services[0].0.clone();
        let mut screen = screen(Order::Bytes);
        assert_eq!(first(&screen), service("web"));
        assert_eq!(press(&mut screen, KeyCode::Char('n')), Next::Stay);
        assert_eq!(first(&screen), service("mail"));
        let _ = press(&mut screen, KeyCode::Char('r'));
        assert_eq!(first(&screen), service("web"));
        // The chosen service stays chosen, wherever it has moved to.
        assert_eq!(screen.chosen, Some(service("web")));
        let _ = press(&mut screen, KeyCode::Down);
        assert_eq!(screen.chosen, Some(service("mail")));
        let _ = press(&mut screen, KeyCode::End);
        assert_eq!(screen.chosen, Some(service("mail")));
        let _ = press(&mut screen, KeyCode::Home);
        assert_eq!(screen.chosen, Some(service("web")));
        for order in ['b', 'p', 'c'] {
            let _ = press(&mut screen, KeyCode::Char(order));
            assert_eq!(first(&screen), service("mail"), "{order} turned");
        }
    }

    #[test]
    fn q_escape_and_control_c_end_it() {
        let mut screen = screen(Order::Name);
        assert_eq!(press(&mut screen, KeyCode::Char('q')), Next::Quit);
        assert_eq!(press(&mut screen, KeyCode::Esc), Next::Quit);
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(screen.press(interrupt), Next::Quit);
    }

    #[test]
    fn a_problem_is_shown_in_place_of_the_keys() {
        let mut screen = screen(Order::Name);
        screen.fail("the maps cannot be read".to_owned());
        assert!(drawn(&screen).contains("the maps cannot be read"));
    }

    #[test]
    fn a_service_that_has_gone_is_chosen_no_more() {
        let mut screen = screen(Order::Bytes);
        screen.show(Change {
            services: vec![(service("mail"), Rates::default())],
            ..Change::default()
        });
        assert_eq!(screen.chosen, Some(service("mail")));
        screen.show(Change::default());
        assert_eq!(screen.chosen, None);
        assert!(drawn(&screen).contains("Services (0)"));
    }

    #[test]
    fn rates_have_few_digits() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(7.25), "7.2");
        assert_eq!(number(1234.0), "1234");
        assert_eq!(number(123_456.0), "123.5k");
        assert_eq!(number(12_345_678.0), "12M");
        assert_eq!(bytes(512.0), "512");
        assert_eq!(bytes(10_000.0), "9.8Ki");
        assert_eq!(bytes(1e12), "931Gi");
    }
}
