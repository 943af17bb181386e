//! Learning rate by update: linear warm-up, then half a cosine (transformers' `get_cosine_schedule_with_warmup`).

/// The schedule of a run.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    peak: f64,
    warmup: u64,
    total: u64,
}

impl Schedule {
    /// A schedule over `total` updates that peaks at `peak` after the share `warmup_ratio` of them, rounded up.
    pub fn new(peak: f64, warmup_ratio: f64, total: u64) -> Self {
        Self { peak, warmup: (warmup_ratio * total as f64).ceil() as u64, total }
    }

    /// The learning rate of update `step`, counted from 0. The first is 0 if there is a warm-up.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        let progress = (step - self.warmup) as f64 / (self.total - self.warmup).max(1) as f64;
        self.peak * (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    /// Values the original experiment logged: 50 epochs of 4 updates, peak 5e-4, 10 % warm-up.
    #[test]
    fn follows_the_published_log() {
        let schedule = Schedule::new(5e-4, 0.1, 200);
        for (update, logged) in [(4, 7.5e-5), (8, 0.000175), (184, 1.0923811009241142e-05), (192, 3.077914851215585e-6)]
        {
            // The value logged after update n is the one it was made with.
            let ours = schedule.rate(update - 1);
            assert!((ours - logged).abs() < 1e-12 * logged, "update {update}: {ours}, logged {logged}");
        }
        assert_eq!(schedule.rate(0), 0.0);
        assert_eq!(schedule.rate(20), 5e-4);
    }
}
