//! Plain HTTP, as little as a test needs.

use std::collections::BTreeMap;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::cluster::within;

/// Asks for a path: the status and the body.
///
/// # Errors
/// Those of the connection.
///
/// # Panics
/// If the other side hangs, or what it says is no HTTP.
pub async fn get(address: &str, path: &str) -> std::io::Result<(u16, String)> {
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<String, std::io::Error>(answer)
    };
    let answer = within(&format!("{address}{path}"), asking).await?;
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a head has a status");
    Ok((status, body.to_owned()))
}

/// A page of `/metrics`: each line's name with its labels, and its value.
///
/// # Panics
/// If a line does not read.
pub fn metrics(page: &str) -> BTreeMap<String, f64> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let read = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?} has no value"));
        let value = value.parse().unwrap_or_else(|_| panic!("{line:?} has no number"));
        (name.to_owned(), value)
    };
    lines.map(read).collect()
}

/// The names of the metrics that a page has heads for.
pub fn metric_names(page: &str) -> Vec<String> {
    let heads = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    heads.filter_map(|head| head.split(' ').next()).map(str::to_owned).collect()
}
