//! Values as people write them.

use std::{str::FromStr, time::Duration};

const SIZES: [(&str, u64); 5] =
    [("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
const TIMES: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

fn with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

pub(super) fn bytes(text: &str) -> Result<u64, String> {
    with_unit(text, &SIZES).ok_or_else(|| {
        "a size is a number of bytes, or one with KiB, MiB, GiB or TiB, as in 512MiB".to_owned()
    })
}

pub(super) fn time(text: &str) -> Result<Duration, String> {
    let ms = with_unit(text, &TIMES).filter(|ms| *ms > 0);
    ms.map(Duration::from_millis)
        .ok_or_else(|| "a time is a number above 0 with ms, s, m or h, as in 100ms".to_owned())
}

pub(super) fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "a whole number that is not below 0 is expected".to_owned())
}

pub(super) fn switch(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "true or false is expected".to_owned())
}

/// An address to listen on or to dial; port 0 only where `any_port`.
pub(super) fn address(text: &str, any_port: bool) -> Result<String, String> {
    let parts = text.rsplit_once(':').filter(|(host, _)| !host.is_empty() && !host.contains(['/', ' ']));
    match parts.map(|(_, port)| port.parse::<u16>()) {
        Some(Ok(port)) if port > 0 || any_port => Ok(text.to_owned()),
        _ => Err("an address is HOST:PORT, as in 127.0.0.1:7400".to_owned()),
    }
}

pub(super) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a label is NAME=VALUE, as in zone=a".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(bytes("512MiB"), Ok(512 << 20));
        assert_eq!(bytes("7"), Ok(7));
        assert_eq!(bytes("2 GiB"), Ok(2 << 30));
        assert_eq!(time("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(time("1h"), Ok(Duration::from_secs(3600)));
        for wrong in ["", "MiB", "1MB", "-1", "1.5GiB", "99999999999TiB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "5", "0s", "ms", "1d"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        assert!(address("127.0.0.1:0", true).is_ok() && address("127.0.0.1:0", false).is_err());
        assert!(address("[::1]:7400", false).is_ok());
        for wrong in ["localhost", ":7400", "http://x:1", "a b:1", "x:99999"] {
            assert!(address(wrong, true).is_err(), "{wrong}");
        }
    }
}
