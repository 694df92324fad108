//! Chance that can be had again.

/// A small generator (xorshift64*) of a seed that is printed.
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// With the seed that this variable says, or another one each time.
    pub fn of(variable: &str) -> Self {
        let seed = crate::how_many(variable, u64::from(std::process::id()) + 1);
        println!("seed {seed}");
        Self(seed)
    }

    /// A number below that.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap() % limit
    }
}
