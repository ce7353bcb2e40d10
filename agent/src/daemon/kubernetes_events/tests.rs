use std::time::SystemTime;

use sluice_core::model::report::Note;

use crate::daemon::failures::Failing;
use crate::node::view::PortName;

use super::*;

fn report(name: &str, flaw: Flaw, field: &str, message: &str) -> Report {
    let subject = Subject::object("Service", &ObjectName::new("shop", name));
    Report { subject, note: Note::new(flaw, field, message), since: SystemTime::UNIX_EPOCH }
}

fn gathered(reports: &[Report]) -> ObjectEvents {
    gather("n1", reports.iter(), &Failures::new(), &FailingServices::new())
}

fn lost(names: &[&str]) -> ObjectEvents {
    let reports: Vec<Report> =
        names.iter().map(|name| report(name, Flaw::ClaimLost, "a", "b")).collect();
    gathered(&reports)
}

fn first(all: &ObjectEvents) -> ObjectEvent {
    let (finding, note) = all.first_key_value().expect("an object's Event");
    ObjectEvent { finding: finding.clone(), note: note.clone() }
}

#[test]
fn what_is_wrong_with_one_object_in_one_way_is_one_event() {
    let all = gathered(&[
        report("web", Flaw::ClaimLost, "192.0.2.2:80 TCP", "Service a has it"),
        report("web", Flaw::ClaimLost, "192.0.2.1:80 TCP", "Service a has it"),
        report("web", Flaw::ClaimContested, "192.0.2.3:80 TCP", "only worth knowing"),
        report("web", Flaw::BadPort, "", "no port"),
    ]);
    let written: Vec<(&str, &str)> =
        all.iter().map(|(finding, note)| (finding.reason, note.as_str())).collect();
    let both = "192.0.2.1:80 TCP: Service a has it; 192.0.2.2:80 TCP: Service a has it";
    assert_eq!(written, [("BadPort", "no port"), ("ClaimLost", both)]);
}

#[test]
fn sources_and_documents_are_no_objects_of_the_api() {
    let document = Subject::Document { path: "a.yaml".into(), index: 1 };
    for subject in [document, Subject::Source(sluice_core::model::SourceId::Kubernetes)] {
        let note = Note::new(Flaw::Unreachable, "", "away");
        assert_eq!(
            gathered(&[Report { subject, note, since: SystemTime::UNIX_EPOCH }]),
            ObjectEvents::new()
        );
    }
}

#[test]
fn a_long_text_is_cut_between_two_characters() {
    let all = gathered(&[
        report("web", Flaw::BadValue, "", &"\u{e4}".repeat(600)),
        report("x", Flaw::BadValue, "f", &"\u{e4}".repeat(600)),
    ]);
    let lengths: Vec<usize> = all.values().map(String::len).collect();
    assert_eq!(lengths, [1024, 1023]);
}

#[test]
fn all_nodes_have_one_name_for_what_is_wrong_with_an_object_and_each_its_own_for_what_is_its_own() {
    let shared = first(&lost(&["web"]));
    assert_eq!(shared.event_name("uid", "n1"), shared.event_name("uid", "n2"));
    assert_ne!(shared.event_name("uid", "n1"), shared.event_name("another", "n1"));
    assert_eq!(shared.event_name("uid", "n1"), "web.fb1936fa4a670db6", "the same in every release");

    let failure = Failure { port: 30_100, causes: vec!["in use".into()] };
    let failures = Failures::from([(ObjectName::new("shop", "web"), failure)]);
    let own = first(&gather("n1", [].into_iter(), &failures, &FailingServices::new()));
    assert_eq!(own.finding.reason, "FailedToStartServiceHealthcheck");
    assert!(own.note.starts_with("on node n1: "), "{}", own.note);
    assert_ne!(own.event_name("uid", "n1"), own.event_name("uid", "n2"));
}

#[test]
fn names_of_events_are_names_even_if_the_objects_is_as_long_as_it_may_be() {
    let name = format!("{}-{}", "a".repeat(219), "b".repeat(33));
    let event = first(&lost(&[&name])).event_name("uid", "n1");
    assert!(event.len() <= 253 && event.starts_with(&format!("{}.", "a".repeat(219))), "{event}");
}

#[test]
fn what_lasts_is_written_once_and_again_when_the_api_server_has_forgotten_it() {
    let (begin, all) = (Instant::now(), lost(&["web"]));
    let finding = first(&all).finding;
    let mut schedule = Schedule::new("n1", begin);
    let Next::Wait(due) = schedule.next(begin, &all) else { panic!("written immediately") };
    assert!(due >= begin + SETTLE && due <= begin + SETTLE + SPREAD);
    assert_eq!(schedule.next(due, &all), Next::Write(finding.clone()));
    schedule.tried(due, &finding, &Outcome::Exists);
    let Next::Wait(again) = schedule.next(due, &all) else { panic!("written twice") };
    assert!(again >= due + AGAIN && again <= due + AGAIN + AGAIN_SPREAD);
    assert_eq!(schedule.next(again, &all), Next::Write(finding.clone()));
    // The problem is fixed: nothing is due, and nothing is remembered in the end.
    assert_eq!(schedule.next(again, &ObjectEvents::new()), Next::Rest);
    assert!(schedule.known.is_empty());
}

#[test]
fn what_comes_and_goes_is_not_written_each_time() {
    let (begin, all) = (Instant::now(), lost(&["web"]));
    let finding = first(&all).finding;
    let mut schedule = Schedule::new("n1", begin);
    // Gone before it was due: as if it had never been.
    let _ = schedule.next(begin, &all);
    assert_eq!(schedule.next(begin + SETTLE + SPREAD, &ObjectEvents::new()), Next::Rest);
    let Next::Wait(due) = schedule.next(begin + SETTLE + SPREAD, &all) else {
        panic!("written immediately")
    };
    assert_eq!(schedule.next(due, &all), Next::Write(finding.clone()));
    schedule.tried(due, &finding, &Outcome::Written);
    for second in 1..1000 {
        let now = due + Duration::from_secs(second);
        let present = if second % 2 == 0 { all.clone() } else { ObjectEvents::new() };
        assert!(
            !matches!(schedule.next(now, &present), Next::Write(_)),
            "written again after {second} s"
        );
    }
}

#[test]
fn a_flood_is_written_at_the_buckets_pace_and_problems_first() {
    let names: Vec<String> = (0..200).map(|index| format!("web-{index}")).collect();
    let notices = names.iter().map(|name| report(name, Flaw::NoLocalEndpoint, "", "dropped"));
    let reports: Vec<Report> = notices.chain([report("z", Flaw::BadPort, "", "no port")]).collect();
    let all = gathered(&reports);
    let begin = Instant::now();
    let mut schedule = Schedule::new("n1", begin);
    let _ = schedule.next(begin, &all);
    let mut now = begin + SETTLE + SPREAD;
    let mut written = Vec::new();
    while now < begin + Duration::from_mins(10) {
        match schedule.next(now, &all) {
            Next::Write(finding) => {
                let outcome = if written.len() % 2 == 0 {
                    Outcome::Written
                } else {
                    Outcome::Failed("no".into())
                };
                schedule.tried(now, &finding, &outcome);
                written.push(finding.reason);
            }
            Next::Wait(until) => now = until,
            Next::Rest => panic!("not all is written"),
        }
    }
    assert_eq!(written.first(), Some(&"BadPort"));
    // The burst, and two a minute.
    assert!((38..=40).contains(&written.len()), "{}", written.len());
}

#[test]
fn a_notice_is_written_once_a_day() {
    let (begin, all) =
        (Instant::now(), gathered(&[report("web", Flaw::NoLocalEndpoint, "", "dropped")]));
    let written = first(&all);
    assert!(written.finding.is_notice && written.note == "on node n1: dropped", "{written:?}");
    let mut schedule = Schedule::new("n1", begin);
    let Next::Wait(due) = schedule.next(begin, &all) else { panic!("written immediately") };
    schedule.tried(due, &written.finding, &Outcome::Exists);
    let Next::Wait(again) = schedule.next(due, &all) else { panic!("written twice") };
    assert!(again >= due + NOTICE_AGAIN, "{:?}", again - due);
}

#[test]
fn what_could_not_be_written_is_tried_again_much_later() {
    let (begin, all) = (Instant::now(), lost(&["web"]));
    let finding = first(&all).finding;
    let mut schedule = Schedule::new("n1", begin);
    let Next::Wait(due) = schedule.next(begin, &all) else { panic!("written immediately") };
    schedule.tried(due, &finding, &Outcome::Failed("forbidden".into()));
    assert_eq!(schedule.next(due, &all), Next::Wait(due + RETRY));
}

#[test]
fn a_service_that_nobody_reaches_has_one_event_when_that_has_lasted() {
    let port = PortName {
        namespace: "shop".to_owned(),
        service: "web".to_owned(),
        label: "http".to_owned(),
        port: 80,
        protocol: "TCP".to_owned(),
    };
    let at = |node: &str, since: SystemTime| {
        let failing = Failing { since, message: "none of 7 attempts".to_owned() };
        let failing = FailingServices::from([(port.clone(), failing)]);
        gather(node, [].into_iter(), &Failures::new(), &failing)
    };
    assert_eq!(at("n1", SystemTime::now()), ObjectEvents::new(), "it may end at once");
    let [one, other] = ["n1", "n2"].map(|node| first(&at(node, SystemTime::UNIX_EPOCH)));
    assert_eq!(one.note, "on node n1, port 80: none of 7 attempts");
    let names = [one.event_name("uid", "n1"), other.event_name("uid", "n2")];
    assert_eq!(names[0], names[1], "one for the whole cluster");
    assert_eq!(one.finding.name, ObjectName::new("shop", "web"));
}
