//! Publishes values to watchers.

use tokio::sync::watch;

/// Replaces the watched value, and wakes watchers only if it differs. Returns whether it does.
pub(crate) fn publish<T: PartialEq>(sender: &watch::Sender<T>, value: T) -> bool {
    publish_part(sender, |all| all, value)
}

/// Replaces a part of the watched value, as [`publish`] does.
pub(crate) fn publish_part<T, P: PartialEq>(
    sender: &watch::Sender<T>,
    part: impl FnOnce(&mut T) -> &mut P,
    value: P,
) -> bool {
    sender.send_if_modified(|all| {
        let part = part(all);
        let is_news = *part != value;
        *part = value;
        is_news
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_news_wakes_who_watches() {
        let (sender, mut watched) = watch::channel((1, 2));
        assert!(!publish(&sender, (1, 2)) && !watched.has_changed().expect("it lives"));
        assert!(publish_part(&sender, |all| &mut all.1, 3));
        assert!(watched.has_changed().expect("it lives"));
        assert_eq!(*watched.borrow_and_update(), (1, 3));
    }
}
