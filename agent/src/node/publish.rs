//! News for those who watch a value.

use tokio::sync::watch;

/// Puts a value in place of the watched one; nobody is woken where it is the same. Returns whether
/// it was news.
pub(crate) fn publish<T: PartialEq>(sender: &watch::Sender<T>, value: T) -> bool {
    publish_part(sender, |all| all, value)
}

/// As [`publish`], of a part of what is watched.
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
