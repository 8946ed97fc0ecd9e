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
    let answer = ask(address, &format!("GET {path}"), &["Host: localhost"], "").await?;
    Ok((answer.status, answer.body))
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// 200 and so on.
    pub status: u16,
    /// Its head, in lower case.
    pub head: String,
    /// The rest.
    pub body: String,
}

/// Asks with headers and a body of one's own: `what` is a method and a path.
///
/// # Errors
/// Those of the connection.
///
/// # Panics
/// As [`get`].
pub async fn ask(address: &str, what: &str, headers: &[&str], body: &str) -> std::io::Result<Answer> {
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        let (headers, length) = (headers.join("\r\n"), body.len());
        let head =
            format!("{what} HTTP/1.1\r\n{headers}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        stream.write_all((head + body).as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<String, std::io::Error>(answer)
    };
    let answer = within(&format!("{address} {what}"), asking).await?;
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a head has a status");
    Ok(Answer { status, head: head.to_lowercase(), body: body.to_owned() })
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
