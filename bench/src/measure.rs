//! Samples, their middle and their spread; two subjects measured turn and turn about.

use std::time::Instant;

/// What a run was asked for.
pub struct Options {
    /// Fewer rounds.
    pub quick: bool,
    /// Only cases whose name contains this.
    pub only: Option<String>,
}

impl Options {
    /// Whether `case` is wanted.
    pub fn wants(&self, case: &str) -> bool {
        self.only.as_ref().is_none_or(|text| case.contains(text.as_str()))
    }

    /// `full` rounds, or fewer.
    pub fn rounds(&self, full: usize) -> usize {
        if self.quick { (full / 5).max(5) } else { full }
    }
}

/// Values of one quantity, one a round.
#[derive(Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// The value that a share of `q` lies below.
    pub fn quantile(&self, q: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            n => sorted[((n - 1) as f64 * q).round() as usize],
        }
    }

    /// The middle value.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// How many.
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Each times `factor`.
    pub fn scaled(&self, factor: f64) -> Self {
        Self(self.0.iter().map(|v| v * factor).collect())
    }

    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }
}

/// Two subjects' samples, paired by round.
pub struct Pair {
    pub ours: Samples,
    pub baseline: Samples,
    ratios: Samples,
}

impl Pair {
    /// Two subjects' samples that were taken in the same rounds.
    pub fn of(ours: &Samples, baseline: &Samples) -> Self {
        let ratios = Samples(ours.0.iter().zip(&baseline.0).map(|(a, b)| a / b).collect());
        Self { ours: ours.clone(), baseline: baseline.clone(), ratios }
    }

    /// Each value times `factor`.
    pub fn scaled(&self, factor: f64) -> Self {
        Self::of(&self.ours.scaled(factor), &self.baseline.scaled(factor))
    }

    /// The middle of the rounds' ratios: drift of the machine hits both halves of a round alike.
    pub fn ratio(&self) -> f64 {
        self.ratios.median()
    }

    /// Between which values the middle ratio lies, with 95 % confidence: the rounds that so many would be on the wrong side of
    /// by chance.
    pub fn ratio_bounds(&self) -> (f64, f64) {
        let off = 0.98 / (self.ratios.len().max(1) as f64).sqrt();
        (self.ratios.quantile((0.5 - off).max(0.0)), self.ratios.quantile((0.5 + off).min(1.0)))
    }
}

/// Measures both `rounds` times, in alternating order, after one round each that does not count (none if two rounds are all).
pub fn versus(rounds: usize, ours: impl FnMut() -> f64, baseline: impl FnMut() -> f64) -> Pair {
    versus_until(rounds, ours, baseline, |_| true)
}

/// As [`versus`], and up to five times as often, until it is told on which side of `limit` the ratio lies.
pub fn versus_within(
    limit: f64,
    rounds: usize,
    ours: impl FnMut() -> f64,
    baseline: impl FnMut() -> f64,
) -> Pair {
    versus_until(rounds, ours, baseline, |pair| {
        let (low, high) = pair.ratio_bounds();
        pair.ours.len() >= 5 * rounds || low > limit || high <= limit
    })
}

fn versus_until(
    rounds: usize,
    mut ours: impl FnMut() -> f64,
    mut baseline: impl FnMut() -> f64,
    mut enough: impl FnMut(&Pair) -> bool,
) -> Pair {
    if rounds > 2 {
        ours();
        baseline();
    }
    let mut pair =
        Pair { ours: Samples::default(), baseline: Samples::default(), ratios: Samples::default() };
    for round in 0.. {
        if round > 0 && round % rounds.max(1) == 0 && enough(&pair) {
            break;
        }
        let (a, b) = if round % 2 == 0 {
            let a = ours();
            (a, baseline())
        } else {
            let b = baseline();
            (ours(), b)
        };
        pair.ours.push(a);
        pair.baseline.push(b);
        pair.ratios.push(a / b);
    }
    pair
}

/// Measures one subject.
pub fn alone(rounds: usize, mut subject: impl FnMut() -> f64) -> Samples {
    subject();
    let mut samples = Samples::default();
    for _ in 0..rounds {
        samples.push(subject());
    }
    samples
}

/// Nanoseconds that `f` takes.
pub fn time_ns(f: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    f();
    begun.elapsed().as_nanos() as f64
}

/// A generator of pseudo-random numbers (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub const fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The numbers below `count` in random order.
    pub fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            order.swap(i, (self.next_u64() % (i as u64 + 1)) as usize);
        }
        order
    }
}
