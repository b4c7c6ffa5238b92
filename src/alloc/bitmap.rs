//! Searching free space: pure.

use crate::layout::geometry::GROUP_BLOCKS;

const BITS: u64 = GROUP_BLOCKS;

/// `count` bits from bit `first` on.
pub fn mask(first: u64, count: u64) -> u16 {
    let ones = if count >= BITS { u16::MAX } else { (1u16 << count) - 1 };
    ones << first
}

/// The first run of at least `want` free blocks (bit set: free) that begins in word `from` or later, cut to
/// `want`; else the longest run there is. In units of blocks; `align` is 1 or a whole word.
pub fn find_run(free: &[u16], from: usize, want: u64, align: u64) -> Option<(u64, u64)> {
    let mut best: Option<(u64, u64)> = None;
    let mut run_start = 0u64;
    let mut run_len = 0u64;
    let close = |start: u64, len: u64, best: &mut Option<(u64, u64)>| {
        let aligned = start.next_multiple_of(align);
        let len = len.saturating_sub(aligned - start) / align * align;
        if len > 0 && best.is_none_or(|(_, l)| l < len) {
            *best = Some((aligned, len));
        }
    };
    for (i, word) in free.iter().enumerate().skip(from) {
        let base = i as u64 * BITS;
        match *word {
            u16::MAX => {
                if run_len == 0 {
                    run_start = base;
                }
                run_len += BITS;
            }
            0 => {
                close(run_start, run_len, &mut best);
                run_len = 0;
            }
            word => {
                for bit in 0..BITS {
                    if word & (1 << bit) != 0 {
                        if run_len == 0 {
                            run_start = base + bit;
                        }
                        run_len += 1;
                    } else {
                        close(run_start, run_len, &mut best);
                        run_len = 0;
                    }
                }
            }
        }
        let usable = run_len.saturating_sub(run_start.next_multiple_of(align) - run_start);
        if usable >= want {
            return Some((run_start.next_multiple_of(align), want));
        }
        if let Some((start, len)) = best
            && len >= want
        {
            return Some((start, want));
        }
    }
    close(run_start, run_len, &mut best);
    best.map(|(start, len)| (start, len.min(want)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn masks() {
        assert_eq!(mask(0, 16), 0xffff);
        assert_eq!(mask(3, 2), 0b11000);
        assert_eq!(mask(15, 1), 0x8000);
    }

    proptest! {
        #[test]
        fn a_found_run_is_free_and_none_longer_was_missed(
            words in prop::collection::vec(prop_oneof![Just(0u16), Just(u16::MAX), any::<u16>()], 1..40),
            from in 0usize..8,
            want in 1u64..70,
            whole in any::<bool>(),
        ) {
            let align = if whole { 16 } else { 1 };
            let want = if whole { want.next_multiple_of(16) } else { want };
            let is_free = |b: u64| words.get((b / 16) as usize).is_some_and(|w| w & (1 << (b % 16)) != 0);
            let total = words.len() as u64 * 16;
            let start = from as u64 * 16;
            let mut longest = 0;
            for first in (start..total.max(start)).filter(|b| b % align == 0) {
                let len = (first..total).take_while(|b| is_free(*b)).count() as u64 / align * align;
                longest = longest.max(len);
            }
            match find_run(&words, from, want, align) {
                None => prop_assert_eq!(longest, 0),
                Some((first, len)) => {
                    prop_assert!(first >= start && first % align == 0 && len <= want);
                    prop_assert!((first..first + len).all(is_free));
                    prop_assert_eq!(len, longest.min(want));
                }
            }
        }
    }
}
