//! A headless browser, driven by its DevTools protocol over two pipes: what a person with a keyboard would do and see.

use std::{
    collections::HashMap,
    path::Path,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use base64::Engine;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::oneshot,
};

use crate::cluster::{until, within};

/// The names under which it is looked for.
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
/// The protocol is spoken on the descriptors 3 and 4; a process is given its standard ones only.
const PIPES: &str = "exec \"$@\" 3<&0 4>&1 1>&2 </dev/null";

/// A browser's process. Dropping it kills it.
#[derive(Debug)]
pub struct Browser {
    _child: Child,
    to: tokio::sync::Mutex<ChildStdin>,
    shared: Arc<Shared>,
    next: AtomicU64,
    _profile: tempfile::TempDir,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<HashMap<u64, oneshot::Sender<Value>>>,
    /// What pages complained of: errors in the console, exceptions, and what their policy forbade.
    complaints: Mutex<Vec<String>>,
}

impl Shared {
    async fn listen(self: Arc<Self>, from: ChildStdout) {
        let mut messages = BufReader::new(from).split(0);
        while let Ok(Some(message)) = messages.next_segment().await {
            let Ok(message) = serde_json::from_slice::<Value>(&message) else { continue };
            if let Some(id) = message["id"].as_u64() {
                if let Some(waiting) = self.waiting.lock().expect("nobody panics").remove(&id) {
                    drop(waiting.send(message));
                }
                continue;
            }
            let params = &message["params"];
            let complaint = match message["method"].as_str() {
                Some("Runtime.exceptionThrown") => Some(params["exceptionDetails"].to_string()),
                Some("Runtime.consoleAPICalled") if params["type"] == "error" => {
                    Some(params["args"].to_string())
                }
                Some("Log.entryAdded") if params["entry"]["level"] == "error" => {
                    Some(params["entry"].to_string())
                }
                _ => None,
            };
            self.complaints.lock().expect("nobody panics").extend(complaint);
        }
        // Whoever waits hears that nothing comes any more.
        self.waiting.lock().expect("nobody panics").clear();
    }
}

impl Browser {
    /// Starts one with a profile in `scratch`; `None` if none is installed.
    ///
    /// # Panics
    /// If it is there and does not start.
    pub fn start(scratch: tempfile::TempDir) -> Option<Browser> {
        let path = std::env::var_os("PATH")?;
        let mut places = std::env::split_paths(&path).flat_map(|dir| NAMES.map(|name| dir.join(name)));
        let program = places.find(|place| place.is_file())?;
        let profile = format!("--user-data-dir={}", scratch.path().display());
        let mut child = Command::new("sh")
            .args(["-c", PIPES, "sh"])
            .arg(program)
            // What it shows comes from this machine and this program; containers have no other sandbox to give.
            .args([
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
            ])
            .args(["--no-first-run", "--disable-extensions", "--disable-background-networking", &profile])
            .arg("--remote-debugging-pipe")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("a shell starts");
        let to = tokio::sync::Mutex::new(child.stdin.take().expect("stdin is a pipe"));
        let shared = Arc::new(Shared::default());
        tokio::spawn(shared.clone().listen(child.stdout.take().expect("stdout is a pipe")));
        Some(Browser { _child: child, to, shared, next: AtomicU64::new(1), _profile: scratch })
    }

    async fn call(&self, session: Option<&str>, method: &str, params: Value) -> Value {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ "id": id, "method": method, "params": params });
        if let Some(session) = session {
            message["sessionId"] = session.into();
        }
        let (sender, answer) = oneshot::channel();
        self.shared.waiting.lock().expect("nobody panics").insert(id, sender);
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.to.lock().await.write_all(&bytes).await.expect("the browser listens");
        let answer = within(method, answer).await.expect("the browser answers");
        assert!(answer["error"].is_null(), "{method} {params}: {answer}");
        answer["result"].clone()
    }

    /// A new page, and what it does is listened to.
    pub async fn page(&self) -> Page<'_> {
        let target = self.call(None, "Target.createTarget", json!({ "url": "about:blank" })).await;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = self.call(None, "Target.attachToTarget", attach).await;
        let session = attached["sessionId"].as_str().expect("a session has a name").to_owned();
        let page = Page { browser: self, session };
        for domain in ["Page", "Runtime", "Log"] {
            page.call(&format!("{domain}.enable"), json!({})).await;
        }
        page
    }

    /// What pages have complained of so far.
    pub fn complaints(&self) -> Vec<String> {
        self.shared.complaints.lock().expect("nobody panics").clone()
    }
}

/// A page of a [`Browser`].
#[derive(Debug)]
pub struct Page<'a> {
    browser: &'a Browser,
    session: String,
}

impl Page<'_> {
    async fn call(&self, method: &str, params: Value) -> Value {
        self.browser.call(Some(&self.session), method, params).await
    }

    /// As wide and high as this, in light or dark.
    pub async fn looks(&self, width: u32, height: u32, dark: bool) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", metrics).await;
        let scheme = json!({ "name": "prefers-color-scheme", "value": if dark { "dark" } else { "light" } });
        let still = json!({ "name": "prefers-reduced-motion", "value": "reduce" });
        self.call("Emulation.setEmulatedMedia", json!({ "features": [scheme, still] })).await;
    }

    /// Goes to an address.
    pub async fn goes(&self, url: &str) {
        self.call("Page.navigate", json!({ "url": url })).await;
    }

    /// What an expression is worth in the page.
    ///
    /// # Panics
    /// If it throws.
    pub async fn tells(&self, expression: &str) -> Value {
        let ask = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", ask).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true in the page.
    ///
    /// # Panics
    /// As [`within`], with what the page shows.
    pub async fn shows(&self, what: &str, expression: &str) {
        let look =
            until(what, async || (self.tells(&format!("Boolean({expression})")).await == true).then_some(()));
        let shown = tokio::time::timeout(std::time::Duration::from_secs(30), look).await;
        if shown.is_err() {
            panic!("the page does not show {what}:\n{}", self.tells("document.body.innerText").await);
        }
    }

    /// Presses a key that has a name.
    pub async fn presses(&self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "Escape" => (27, ""),
            "Space" => (32, " "),
            "ArrowLeft" => (37, ""),
            "ArrowDown" => (40, ""),
            other => panic!("what is the code of {other}?"),
        };
        let name = if key == "Space" { " " } else { key };
        let event = |kind: &str| json!({ "type": kind, "key": name, "code": key, "windowsVirtualKeyCode": code, "text": text });
        self.call("Input.dispatchKeyEvent", event("keyDown")).await;
        self.call("Input.dispatchKeyEvent", event("keyUp")).await;
    }

    /// Types letters, one by one.
    pub async fn types(&self, text: &str) {
        for letter in text.chars() {
            let event =
                |kind: &str| json!({ "type": kind, "key": letter.to_string(), "text": letter.to_string() });
            self.call("Input.dispatchKeyEvent", event("keyDown")).await;
            self.call("Input.dispatchKeyEvent", event("keyUp")).await;
        }
    }

    /// Presses Tab until what has the focus says this, as its text, label or id.
    ///
    /// # Panics
    /// If nothing that can have the focus does.
    pub async fn tabs_to(&self, name: &str) {
        let has = "(e => [e.textContent.trim(), e.getAttribute('aria-label'), e.id])(document.activeElement)";
        for _ in 0..200 {
            self.presses("Tab").await;
            let names = self.tells(has).await;
            let fits = |found: &Value| {
                found.as_str().is_some_and(|found| found == name || found.starts_with(&format!("{name} ")))
            };
            if names.as_array().is_some_and(|names| names.iter().any(fits)) {
                return;
            }
        }
        panic!("Tab does not lead to {name:?}:\n{}", self.tells("document.body.innerText").await);
    }

    /// A picture of the page as it is, as PNG.
    ///
    /// # Panics
    /// If it cannot be written.
    pub async fn pictures(&self, file: &Path) {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" })).await;
        let data = shot["data"].as_str().expect("a picture has data");
        let png = base64::engine::general_purpose::STANDARD.decode(data).expect("it is base64");
        std::fs::write(file, png).expect("a picture can be written");
    }
}
