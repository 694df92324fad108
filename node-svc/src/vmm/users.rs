//! The users that VMMs run as: whoever breaks out of a guest is nobody on the host.

use std::{fmt, str::FromStr};

/// Who a process becomes, with no privilege left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User, and group of the same number.
    pub uid: u32,
    /// A group more, for a device it needs.
    pub group: Option<u32>,
}

/// Users that VMMs run as: one for each network slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UidRange {
    first: u32,
    last: u32,
}

/// No such user.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UidError {
    /// It is not two numbers.
    #[error("it is not FIRST-LAST, as in 1900000000-1900032767")]
    Syntax,
    /// A VMM would be root, or there is nobody.
    #[error("FIRST must be at least 1000, and LAST not below it")]
    Range,
    /// There are more slots than users.
    #[error("slot {slot} has no user: {range} has {count}; give more by --vmm-uids")]
    TooFew {
        /// Which slot.
        slot: u32,
        /// The users.
        range: UidRange,
        /// How many.
        count: u32,
    },
}

impl UidRange {
    /// The user of a slot, and its group.
    pub fn of(self, slot: u32) -> Result<u32, UidError> {
        let uid = self.first.checked_add(slot);
        uid.filter(|uid| *uid <= self.last).ok_or(UidError::TooFew {
            slot,
            range: self,
            count: self.last - self.first + 1,
        })
    }
}

impl FromStr for UidRange {
    type Err = UidError;

    fn from_str(text: &str) -> Result<Self, UidError> {
        let (first, last) = text.split_once('-').ok_or(UidError::Syntax)?;
        let number = |text: &str| text.parse::<u32>().map_err(|_| UidError::Syntax);
        let (first, last) = (number(first)?, number(last)?);
        // u32::MAX is "no user" to chown(2).
        if first < 1000 || last < first || last == u32::MAX {
            return Err(UidError::Range);
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for UidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_a_user_or_the_error_says_what_to_do() {
        let range: UidRange = "5000-5009".parse().unwrap();
        assert_eq!(range.of(0), Ok(5000));
        assert_eq!(range.of(9), Ok(5009));
        let error = range.of(10).unwrap_err();
        assert!(error.to_string().contains("--vmm-uids"), "{error}");
        assert!(range.of(u32::MAX).is_err());
        for (text, error) in [
            ("5000", UidError::Syntax),
            ("a-b", UidError::Syntax),
            ("0-100", UidError::Range),
            ("5000-4999", UidError::Range),
            ("5000-4294967295", UidError::Range),
        ] {
            assert_eq!(text.parse::<UidRange>(), Err(error), "{text}");
        }
    }
}
