//! Checkpoints, history and plots are written while the next epoch trains.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::checkpoint::{self, Snapshot};
use crate::error::Kind;
use crate::{Error, Result, report};

/// Time from one drawing of the plots to the next: they take longer than an epoch may.
const BETWEEN_DRAWINGS: Duration = Duration::from_secs(1);

/// A thread that writes what an epoch leaves in a run's folder. Dropped, it finishes what it has begun.
pub struct Keeper {
    jobs: Option<SyncSender<Snapshot>>,
    thread: Option<JoinHandle<Result<()>>>,
    kept: Arc<AtomicUsize>,
    /// Whether the run has come to its end, which draws the plots.
    complete: Arc<AtomicBool>,
}

impl Keeper {
    /// A keeper of the run `name` in the folder `out`, where `keep` checkpoints stay; `kept` epochs were written before.
    pub fn new(name: &str, out: PathBuf, keep: usize, kept: usize) -> Self {
        let name = name.to_string();
        let kept = Arc::new(AtomicUsize::new(kept));
        let written = Arc::clone(&kept);
        let complete = Arc::new(AtomicBool::new(false));
        let drawn_later = Arc::clone(&complete);
        // Nothing waits in line: at most one epoch is being written while another trains.
        let (jobs, queue) = sync_channel::<Snapshot>(0);
        let thread = std::thread::spawn(move || {
            let (mut drawn, mut to_draw) = (None::<Instant>, None);
            for snapshot in queue {
                snapshot.write(&out)?;
                written.store(snapshot.state.epoch, Ordering::Release);
                checkpoint::prune(&out, &snapshot.state, keep)?;
                let history = snapshot.state.log_history;
                report::run::write_history(&out, &history)?;
                if drawn.is_none_or(|drawn| drawn.elapsed() >= BETWEEN_DRAWINGS) {
                    report::run::draw(&out, &name, &history)?;
                    (drawn, to_draw) = (Some(Instant::now()), None);
                } else {
                    to_draw = Some(history);
                }
            }
            match to_draw.filter(|_| !drawn_later.load(Ordering::Acquire)) {
                Some(history) => report::run::draw(&out, &name, &history),
                None => Ok(()),
            }
        });
        Self { jobs: Some(jobs), thread: Some(thread), kept, complete }
    }

    /// Hands over an epoch, as soon as the one before it is written.
    ///
    /// # Errors
    /// When the one before could not be written.
    pub fn keep(&mut self, snapshot: Snapshot) -> Result<()> {
        match &self.jobs {
            Some(jobs) if jobs.send(snapshot).is_ok() => Ok(()),
            // The thread ends early only with an error.
            _ => self.finish(false),
        }
    }

    /// Epochs done by the newest checkpoint that was written whole; of those handed over, after [`Keeper::finish`].
    pub fn kept(&self) -> usize {
        self.kept.load(Ordering::Acquire)
    }

    /// Waits until everything is written; plots of the last epochs only unless the run is `complete`, whose end draws them.
    ///
    /// # Errors
    /// When something could not be.
    pub fn finish(&mut self, complete: bool) -> Result<()> {
        self.complete.store(complete, Ordering::Release);
        self.jobs = None;
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(Error::new(Kind::Internal, "the thread that writes checkpoints ended in a panic")),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // What led here is the error to report.
        let _ = self.finish(false);
    }
}
