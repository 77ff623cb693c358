//! What a server reports at login, remembered by startup settings, so that a client can be greeted without one. No I/O.

use std::sync::Arc;

use super::Settings;
use super::params::Params;

/// Most startup settings that are remembered. Clients of an application ask for one or a few; a client that puts the number
/// of its request into `options` asks for others each time.
const KEPT: usize = 64;

/// The ones used last, those of the latest use at the end.
#[derive(Default)]
pub(super) struct Welcomes(Vec<(Arc<Settings>, Arc<Params>)>);

impl Welcomes {
    /// What is reported with these settings, if that is known.
    pub(super) fn get(&mut self, settings: &Arc<Settings>) -> Option<Arc<Params>> {
        let at = self.0.iter().rposition(|(have, _)| Arc::ptr_eq(have, settings) || have == settings)?;
        self.0[at..].rotate_left(1);
        self.0.last().map(|(_, params)| params.clone())
    }

    /// Remembers what a server has reported, unless that is known.
    pub(super) fn note(&mut self, settings: &Arc<Settings>, params: &Arc<Params>) {
        if self.get(settings).is_some() {
            return;
        }
        if self.0.len() >= KEPT {
            self.0.remove(0);
        }
        self.0.push((settings.clone(), params.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ones_used_last_are_remembered() {
        let mut welcomes = Welcomes::default();
        let settings = |n: usize| Arc::new(vec![("app.request".to_owned(), n.to_string())]);
        let all: Vec<_> = (0..1_000).map(settings).collect();
        for one in &all {
            welcomes.note(one, &Arc::default());
            // Used all the time, and not by the same pointer.
            assert!(welcomes.get(&settings(0)).is_some());
        }
        assert_eq!(welcomes.0.len(), KEPT);
        assert!(welcomes.get(&all[999]).is_some() && welcomes.get(&all[900]).is_none());
        // Nobody else holds what is forgotten.
        assert_eq!(all.iter().filter(|one| Arc::strong_count(one) > 1).count(), KEPT);
    }
}
