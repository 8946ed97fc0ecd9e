//! The console: what its routes answer and to whom, and its pages in a real browser against a real cluster.
//!
//! Pictures of every page, light and dark, wide and as narrow as a phone, are left in `target/tmp/console`.

use std::{fs, path::PathBuf};

use pontoon_proto::v1::MovePhase;
use pontoon_tests::{
    browser::{Browser, Page},
    cluster::{Cluster, until, within},
    http::{Answer, ask, get},
    process::Program,
    traffic::{Traffic, fill},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

const JSON: &str = "Content-Type: application/json";
/// So many pages may listen at a node.
const LISTENERS: usize = 64;

async fn asks(address: &str, path: &str) -> Value {
    let (status, body) = get(address, path).await.expect("the node listens");
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path} is no JSON, {error}: {body}"))
}

/// An order as a page of the node itself gives it.
async fn orders(address: &str, path: &str, order: Value) -> Answer {
    let (host, origin) = (format!("Host: {address}"), format!("Origin: http://{address}"));
    let headers = [&host, &origin, "Sec-Fetch-Site: same-origin", JSON];
    ask(address, &format!("POST {path}"), &headers, &order.to_string()).await.expect("the node listens")
}

/// A stream of what goes on, opened: its lines, or the status that refuses it.
async fn listens(address: &str) -> Result<BufReader<TcpStream>, u16> {
    let mut stream = BufReader::new(TcpStream::connect(address).await.expect("the node listens"));
    let request = "GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("the node reads");
    let mut line = String::new();
    within("a stream to begin", stream.read_line(&mut line)).await.expect("the node answers");
    match line.split(' ').nth(1).and_then(|code| code.parse().ok()) {
        Some(200) => Ok(stream),
        code => Err(code.expect("an answer has a status")),
    }
}

/// Reads on until a line begins so.
async fn hears(stream: &mut BufReader<TcpStream>, word: &str) -> String {
    let reading = async {
        loop {
            let mut line = String::new();
            assert!(
                stream.read_line(&mut line).await.expect("the stream goes on") > 0,
                "it ended without {word}"
            );
            if line.starts_with(word) {
                return line;
            }
        }
    };
    within(word, reading).await
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_answer_orders_are_bound_to_what_was_shown_and_strangers_get_nothing() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let address = cluster.address(0).to_owned();
    let client = cluster.client().await;
    fill(&client, "name", 200, 100).await;
    fill(&client, "a/b c", 10, 10).await;
    let holders = cluster.voters("name", 3).await;
    cluster.voters("a/b c", 3).await;
    let spare = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
    let (from, to) = (cluster.id(holders[0]), cluster.id(spare));

    // Pages: strict about where things come from, asked for anew, and sent anew only when they are others.
    let page = ask(&address, "GET /", &["Host: localhost"], "").await.unwrap();
    assert_eq!(page.status, 200);
    for word in [
        "content-security-policy: default-src 'self'",
        "nosniff",
        "cache-control: no-cache",
        "frame-ancestors 'none'",
    ] {
        assert!(page.head.contains(word), "{word}: {}", page.head);
    }
    assert!(!page.body.contains("style=") && !page.body.contains("<script>"), "{}", page.body);
    let tag = page.head.lines().find_map(|line| line.strip_prefix("etag: ")).expect("a page has a tag");
    let again =
        ask(&address, "GET /console/app.js", &["Host: localhost", &format!("If-None-Match: {tag}")], "")
            .await
            .unwrap();
    assert_eq!((again.status, again.body.as_str()), (304, ""));
    for path in ["/console/none.js", "/console/../Cargo.toml", "/api/none", "/api/move"] {
        assert_eq!(get(&address, path).await.unwrap().0, 404, "{path}");
    }

    // Every node answers for the whole cluster.
    for at in 0..4 {
        let now = until("the node to have heard of everything", async || {
            let now = asks(cluster.address(at), "/api/now").await;
            (now["overview"]["nodes_answering"] == 4 && now["overview"]["predicates"] == 2).then_some(now)
        })
        .await;
        assert_eq!((&now["overview"]["node"], &now["you"]["acts"]), (&json!(cluster.id(at)), &json!(true)));
    }
    let matrix = asks(&address, "/api/matrix?name=NAM&sort=size").await;
    assert_eq!((&matrix["total"], &matrix["rows"][0]["predicate"]), (&json!(1), &json!("name")));
    assert_eq!(matrix["rows"][0]["cells"].as_array().map(Vec::len), Some(3));
    let page = asks(&address, "/api/matrix?offset=1&limit=1").await;
    assert_eq!((&page["total"], page["rows"].as_array().map(Vec::len)), (&json!(3), Some(1)));
    let elsewhere = asks(&address, &format!("/api/matrix?name=name&node={to}")).await;
    assert_eq!(elsewhere["total"], 0);
    for bad in ["/api/matrix?sort=taste", "/api/matrix?limit=many", "/api/events?after=x"] {
        assert_eq!(get(&address, bad).await.unwrap().0, 400, "{bad}");
    }
    let one = asks(&address, "/api/predicate?name=a%2Fb%20c").await;
    assert_eq!(
        (&one["predicate"], one["explanation"]["nodes"].as_array().map(Vec::len)),
        (&json!("a/b c"), Some(4))
    );
    assert_eq!(get(&address, "/api/predicate?name=none").await.unwrap().0, 404);
    assert!(!asks(&address, "/api/events").await["events"].as_array().expect("a list").is_empty());
    until("what was written to be in the heat map", async || {
        let heat = asks(&address, "/api/heat?column=10").await;
        heat["rows"].as_array()?.iter().any(|row| row["predicate"] == "name").then_some(())
    })
    .await;

    // Who is not a page of this node gives no orders.
    let order = json!({ "predicate": "name", "from": from, "to": to, "dry_run": true }).to_string();
    let (host, own) = (format!("Host: {address}"), format!("Origin: http://{address}"));
    let other = format!("Origin: http://{}", cluster.address(1));
    for (status, headers) in [
        (403, vec![host.as_str(), JSON]),
        (403, vec![&host, &other, JSON]),
        (403, vec![&host, "Origin: https://evil.example", JSON]),
        (403, vec![&host, "Origin: null", JSON]),
        (403, vec!["Host: evil.example", "Origin: http://evil.example", JSON]),
        (403, vec![&host, &own, "Sec-Fetch-Site: cross-site", JSON]),
        (400, vec![&host, &own, "Content-Type: text/plain"]),
        (200, vec![&host, &own, JSON]),
    ] {
        let answer = ask(&address, "POST /api/move/start", &headers, &order).await.unwrap();
        assert_eq!(answer.status, status, "{headers:?}: {}", answer.body);
    }
    assert_eq!(ask(&address, "GET /api/now", &["Host: evil.example"], "").await.unwrap().status, 403);

    // What was shown is done, and nothing else.
    let shown = orders(
        &address,
        "/api/move/start",
        json!({ "predicate": "name", "from": from, "to": to, "dry_run": true }),
    )
    .await;
    let shown: Value = serde_json::from_str(&shown.body).expect("a preview");
    assert_eq!((shown["steps"].as_array().map(Vec::len), &shown["id"]), (Some(4), &json!(0)));
    let start =
        |revision: &Value| json!({ "predicate": "name", "from": from, "to": to, "revision": revision });
    for (order, status) in [
        (start(&json!(0)), 400),
        (start(&json!(1)), 409),
        (json!({ "predicate": "name", "dry_run": true }), 400),
        (json!({ "predicate": "name", "from": from, "to": to, "learner": true, "dry_run": true }), 400),
        (json!({ "predicate": "name", "to": to, "learner": true, "dry_run": true }), 200),
        (json!({ "predicate": "name", "from": from, "what": 1 }), 400),
        (json!({ "predicate": "none", "to": to, "dry_run": true }), 404),
        (start(&shown["revision"]), 200),
    ] {
        let answer = orders(&address, "/api/move/start", order.clone()).await;
        assert_eq!(answer.status, status, "{order}: {}", answer.body);
    }
    let moves = until("the move to be told", async || {
        let now = asks(&address, "/api/now").await;
        let lists = [now["moves"].as_array()?.clone(), now["ended"].as_array()?.clone()].concat();
        (!lists.is_empty()).then_some(lists)
    })
    .await;
    let id = moves[0]["id"].as_u64().expect("a move has a number");
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    let late = orders(&address, "/api/move/start", start(&shown["revision"])).await;
    assert_eq!(late.status, 409, "the nodes are others by now: {}", late.body);
    assert_eq!(orders(&address, "/api/move/cancel", json!({ "id": id })).await.status, 409);

    let drains = async |order: Value| orders(&address, "/api/drain", order).await;
    for (order, status) in [(json!({ "node": to }), 400), (json!({ "node": to, "shown": "0123" }), 409)] {
        let answer = drains(order.clone()).await;
        assert_eq!(answer.status, status, "{order}: {}", answer.body);
    }
    // What it holds may still change after the move: then one looks again, as a person would.
    let shown = until("the node to be drained as it was shown", async || {
        let look = drains(json!({ "node": to, "dry_run": true })).await;
        let look: Value = serde_json::from_str(&look.body).expect("what it holds");
        let answer = drains(json!({ "node": to, "shown": look["shown"] })).await;
        assert!([200, 409].contains(&answer.status), "{}", answer.body);
        (answer.status == 200).then(|| look["shown"].clone())
    })
    .await;
    assert_eq!(drains(json!({ "node": to, "shown": shown })).await.status, 409, "it is draining by now");
    let plan = orders(&address, "/api/rebalance/plan", json!({})).await;
    assert_eq!(plan.status, 200, "{}", plan.body);
    assert_eq!(orders(&address, "/api/rebalance/apply", json!({ "plan": "none" })).await.status, 409);
    cluster
        .says(0, &["audit"], 0, &["MoveStart", "at the console", "Drain", "action=start", "RebalanceApply"])
        .await;

    // So many listen and no more; the node ends all the same, and tells them.
    let mut streams = Vec::new();
    for _ in 0..LISTENERS {
        streams.push(listens(&address).await.expect("there is a place"));
    }
    assert_eq!(listens(&address).await.err(), Some(503));
    for part in ["event: you", "event: overview", "event: nodes", "event: events"] {
        hears(&mut streams[0], part).await;
    }
    drop(streams.pop());
    let again = until("a place to be free", async || listens(&address).await.ok()).await;
    assert!(cluster.terminate(0).await.success());
    drop((streams, again));
}

/// Where pictures are left.
fn pictures() -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("console");
    fs::create_dir_all(&dir).expect("a directory for pictures");
    dir
}

/// Whether everything that a page needs to be used without a mouse or eyes is there, and nothing is cut off.
const CHECKS: &str = r#"(() => {
  const wrong = [];
  const seen = (e) => e.getClientRects().length && getComputedStyle(e).visibility !== "hidden";
  if (document.documentElement.scrollWidth > innerWidth) wrong.push(`wider than the window: ${document.documentElement.scrollWidth} > ${innerWidth}`);
  for (const e of document.querySelectorAll("a, button, input, select, [role=img], [role=progressbar], [role=region], table")) {
    const label = e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.labels?.[0]?.textContent || e.textContent || e.querySelector?.("caption")?.textContent;
    if (seen(e) && !label?.trim()) wrong.push(`no name: ${e.outerHTML.slice(0, 120)}`);
  }
  let level = 0;
  for (const e of document.querySelectorAll("main :is(h1, h2, h3, h4)")) {
    const now = Number(e.tagName[1]);
    if (now > level + 1) wrong.push(`h${now} follows h${level}: ${e.textContent}`);
    level = now;
  }
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not one h1");
  const parse = (text) => { const p = text.match(/[\d.]+/g).map(Number); return text.startsWith("color(srgb") ? [p[0] * 255, p[1] * 255, p[2] * 255, p[3] ?? 1] : [p[0], p[1], p[2], p[3] ?? 1]; };
  const light = ([r, g, b]) => { const c = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
  const behind = (e) => { for (let at = e; at; at = at.parentElement) { const c = parse(getComputedStyle(at).backgroundColor); if (c[3] > 0.99) return c; } return [255, 255, 255, 1]; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !seen(e) || e.closest("script, noscript, option, [disabled], .skip, .unseen, .said")) continue;
    const style = getComputedStyle(e);
    const [one, two] = [light(parse(e instanceof SVGElement ? style.fill : style.color)), light(behind(e))];
    const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (contrast < 4.5) wrong.push(`contrast ${contrast.toFixed(2)}: ${walk.currentNode.data.trim()}`);
  }
  return wrong;
})()"#;

async fn is_sound(page: &Page<'_>, what: &str) {
    let wrong = page.tells(CHECKS).await;
    assert_eq!(wrong, json!([]), "{what}");
}

/// What each page is called in the navigation, and how one sees that it is there.
const PAGES: [(&str, &str); 7] = [
    ("Overview", ".verdict"),
    ("Matrix", ".grid tbody .role.leader"),
    ("Moves", ".panel .phases"),
    ("Problems", ".verdict, .problems"),
    ("Nodes", ".node-card"),
    ("Heat map", ".heat-map rect"),
    ("Events", ".events li"),
];

/// Waits until a page is there as a person would see it.
async fn arrives(page: &Page<'_>, title: &str, sign: &str) {
    let there = format!(
        "document.querySelector('h1')?.textContent === '{title}' && document.querySelector('{sign}')"
    );
    page.shows(title, &there).await;
}

/// Goes to a page by the keyboard alone.
async fn goes_to(page: &Page<'_>, title: &str, sign: &str) {
    page.tells("document.activeElement.blur()").await;
    page.tabs_to(title).await;
    page.presses("Enter").await;
    arrives(page, title, sign).await;
    page.shows("the title to have the focus", "document.activeElement.id === 'title'").await;
}

/// Chooses an option of a select that has the focus, as one does with letters.
async fn chooses(page: &Page<'_>, select: &str, word: &str) {
    page.tabs_to(select).await;
    page.types(word).await;
    page.shows(
        word,
        &format!("document.getElementById('{select}').selectedOptions[0].text.startsWith('{word}')"),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_with_a_keyboard_sees_everything_and_starts_moves_and_drains() {
    let Some(browser) = Browser::start(PROGRAM.scratch()) else {
        println!("skipped: there is no chromium; `apt-get install chromium` brings one");
        return;
    };
    let mut cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    fill(&client, "name", 20_000, 300).await;
    for (predicate, rows) in
        [("director.film", 4_000), ("genre", 900), ("initial_release_date", 2_500), ("starring", 6_000)]
    {
        fill(&client, predicate, rows, 120).await;
    }
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(50).await;
    let holders = cluster.voters("name", 3).await;
    let leader = cluster.leader("name").await;
    let source = holders.iter().copied().find(|&node| node != leader).expect("two follow");
    let spare = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
    let seat = cluster.meta_leader().await;
    let (from, to) = (format!("n{}", cluster.id(source)), format!("n{}", cluster.id(spare)));

    let page = browser.page().await;
    page.looks(1_280, 860, false).await;
    page.goes(&format!("http://{}/", cluster.address(seat))).await;
    arrives(&page, "Overview", ".verdict").await;
    page.shows("the stream", "document.querySelector('.pulse.live')").await;

    // A move from the page: what it would do, then the move, and its phases until it is done.
    goes_to(&page, "Moves", ".panel").await;
    page.tabs_to("start-move").await;
    page.presses("Enter").await;
    page.shows("the dialog", "document.querySelector('dialog[open] #predicate')").await;
    page.tabs_to("predicate").await;
    page.types("name").await;
    chooses(&page, "from", &from).await;
    chooses(&page, "to", &to).await;
    page.tabs_to("look").await;
    page.presses("Enter").await;
    page.shows("each configuration", "document.querySelectorAll('dialog tbody tr').length === 4").await;
    is_sound(&page, "what a move would do").await;
    page.pictures(&pictures().join("move-dry-run.png")).await;
    page.shows("the button to have the focus", "document.activeElement.id === 'confirm'").await;
    page.presses("Enter").await;
    page.shows("the move", "document.querySelector('[data-move]')").await;
    page.pictures(&pictures().join("move-under-way.png")).await;
    page.shows("the end of the move", "document.querySelector('[data-move][data-phase=done]')").await;
    let took = "['snapshot', 'catch-up', 'joint', 'cleanup'].every(p => document.querySelector(`[data-phase=done] [data-phase=${p}] .took`)?.textContent)";
    page.shows("how long each phase took", took).await;
    assert!(cluster.voters("name", 3).await.contains(&spare));

    // Every page by keyboard, in light and dark, wide and narrow.
    for (title, sign) in PAGES {
        goes_to(&page, title, sign).await;
        let name = title.to_lowercase().replace(' ', "-");
        for (width, height) in [(1_280, 860), (360, 780)] {
            for dark in [false, true] {
                page.looks(width, height, dark).await;
                let shade = if dark { "dark" } else { "light" };
                is_sound(&page, &format!("{title}, {width} px, {shade}")).await;
                page.pictures(&pictures().join(format!("{name}-{width}-{shade}.png"))).await;
            }
        }
        page.looks(1_280, 860, false).await;
    }

    // The matrix leads to a predicate; on a phone the pages are behind a button.
    goes_to(&page, "Matrix", ".grid tbody .role.leader").await;
    page.types("/").await;
    page.shows("the filter to have the focus", "document.activeElement.type === 'search'").await;
    page.types("nam").await;
    page.shows("one row", "document.querySelectorAll('.grid tbody .name').length === 1").await;
    page.tabs_to("name").await;
    page.presses("Enter").await;
    arrives(&page, "name", ".explain .tag").await;
    for (width, height) in [(1_280, 860), (360, 780)] {
        page.looks(width, height, false).await;
        is_sound(&page, &format!("a predicate, {width} px")).await;
        page.pictures(&pictures().join(format!("predicate-{width}.png"))).await;
    }
    page.tells("document.activeElement.blur()").await;
    page.tabs_to("menu").await;
    page.presses("Enter").await;
    page.shows("the pages", "document.querySelector('nav').getClientRects().length > 0").await;
    page.pictures(&pictures().join("menu-360.png")).await;
    page.presses("Escape").await;
    page.shows("the page alone", "document.querySelector('nav').getClientRects().length === 0").await;
    page.looks(1_280, 860, false).await;

    // A node is drained, and used again.
    let drained = cluster.id(source);
    goes_to(&page, "Nodes", ".node-card").await;
    for (button, state) in
        [(format!("Drain n{drained}"), "draining"), (format!("Use n{drained} again"), "live")]
    {
        page.tabs_to(&button).await;
        page.presses("Enter").await;
        page.shows("what would be done", "document.activeElement.id === 'confirm'").await;
        page.presses("Enter").await;
        page.shows(
            state,
            &format!("document.querySelector('[data-node=\"{drained}\"][data-state={state}]')"),
        )
        .await;
    }

    // A node that is killed is a problem with its reason.
    let killed = (0..4).find(|&node| node != seat && node != source).expect("two others run");
    cluster.kill(killed).await;
    goes_to(&page, "Problems", ".problems .grave").await;
    let said = format!(
        "[...document.querySelectorAll('.problems li')].some(p => p.textContent.includes('n{}') && p.textContent.includes('does not answer'))",
        cluster.id(killed)
    );
    page.shows("the node that is silent", &said).await;
    page.shows("how many there are", "document.querySelector('nav .badge.bad')").await;
    is_sound(&page, "problems").await;
    page.pictures(&pictures().join("problems-killed.png")).await;
    goes_to(&page, "Overview", ".verdict.bad").await;
    is_sound(&page, "a bad overview").await;
    page.pictures(&pictures().join("overview-killed.png")).await;
    assert_eq!(browser.complaints(), Vec::<String>::new());

    // So is the node that is asked: the page says so, and goes on when it is there again.
    cluster.kill(seat).await;
    page.shows("that nobody answers", "document.querySelector('#trouble .banner.bad')").await;
    page.pictures(&pictures().join("no-answer.png")).await;
    cluster.restart(seat).await;
    page.shows(
        "that it is live again",
        "document.querySelector('.pulse.live') && !document.querySelector('#trouble .banner.bad')",
    )
    .await;
    traffic.stop().await;
}

/// Predicates that are made to fill the matrix.
fn many() -> usize {
    let said = std::env::var("PONTOON_CONSOLE_PREDICATES").ok();
    said.and_then(|text| text.parse().ok()).unwrap_or(120)
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_learners_and_cancelled_moves_are_ordered_from_pages_that_follow_the_command_line() {
    let Some(browser) = Browser::start(PROGRAM.scratch()) else {
        println!("skipped: there is no chromium; `apt-get install chromium` brings one");
        return;
    };
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    // One of them takes several chunks to copy.
    for (n, rows) in [2_000, 20_000, 2_000, 2_000].into_iter().enumerate() {
        fill(&client, &format!("p{n}"), rows, 300).await;
    }
    for n in 0..4 {
        cluster.voters(&format!("p{n}"), 3).await;
    }
    let new = cluster.add().await;
    let (address, added) = (cluster.address(0).to_owned(), cluster.id(new));
    let page = browser.page().await;
    page.looks(1_280, 860, false).await;
    page.goes(&format!("http://{address}/")).await;
    arrives(&page, "Overview", ".verdict").await;
    page.shows("the stream", "document.querySelector('.pulse.live')").await;

    // A plan that fills the new node is shown, applied as it was shown, and comes to its end.
    goes_to(&page, "Nodes", &format!("[data-node=\"{added}\"]")).await;
    page.tabs_to("rebalance").await;
    page.presses("Enter").await;
    page.shows("the plan", "document.activeElement.id === 'confirm'").await;
    page.shows("each node before and after", "document.querySelectorAll('dialog tbody tr').length === 4")
        .await;
    is_sound(&page, "a plan").await;
    page.pictures(&pictures().join("plan.png")).await;
    let shown = page.tells("document.getElementById('confirm').textContent").await;
    let plan = shown.as_str().and_then(|text| text.strip_prefix("Apply plan ")).expect("its name").to_owned();
    page.presses("Enter").await;
    arrives(&page, "Moves", "[data-move]").await;
    goes_to(&page, "Events", ".events li").await;
    let has = |word: &str| {
        format!(
            "[...document.querySelectorAll('.events li')].some(line => line.textContent.includes('{word}'))"
        )
    };
    page.shows("its begin", &has(&format!("plan {plan} begins"))).await;
    page.shows("its end, without being asked", &has(&format!("plan {plan}: all"))).await;
    cluster.map_until("the moves to end", |map| map.moves.is_empty().then_some(())).await;
    cluster.says(0, &["audit"], 0, &["RebalanceApply", &plan]).await;

    // What the command line makes is on the page that is open, and the filter finds it.
    cluster.says(0, &["predicate", "create", "made-elsewhere"], 0, &[]).await;
    page.shows("what was made elsewhere", &has("predicate made-elsewhere is")).await;
    page.types("/").await;
    page.shows("the filter to have the focus", "document.activeElement.type === 'search'").await;
    page.types("made-else").await;
    let all_fit = "[...document.querySelectorAll('.events li')].every(line => line.textContent.includes('made-elsewhere'))";
    page.shows("what fits alone", &format!("document.querySelector('.events li') && {all_fit}")).await;

    // A replica that follows without a vote.
    let holders = cluster.voters("p0", 3).await;
    let spare = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
    goes_to(&page, "Moves", ".panel").await;
    page.tabs_to("start-move").await;
    page.presses("Enter").await;
    page.shows("the dialog", "document.querySelector('dialog[open] #predicate')").await;
    page.tabs_to("predicate").await;
    page.types("p0").await;
    chooses(&page, "to", &format!("n{}", cluster.id(spare))).await;
    page.tabs_to("learner").await;
    page.presses("Space").await;
    page.shows("the mark in the box", "document.getElementById('learner').checked").await;
    page.tabs_to("look").await;
    page.presses("Enter").await;
    page.shows("what it would do", "document.activeElement.id === 'confirm'").await;
    is_sound(&page, "what a learner would be").await;
    page.presses("Enter").await;
    let learner = cluster
        .map_until("the learner to be there", |map| {
            let shard = map.shards.iter().find(|shard| shard.predicate == "p0")?;
            (!shard.learners.is_empty() && map.moves.is_empty()).then(|| shard.clone())
        })
        .await;
    assert_eq!((learner.voters.len(), learner.learners.len()), (3, 1));

    // A move that was begun elsewhere goes back when the page says so. Of a budget this small it takes a while.
    let scratch = PROGRAM.scratch();
    let rules = scratch.path().join("rules.toml");
    fs::write(&rules, "[cluster]\nbudget = \"20000\"\n").expect("rules are written");
    cluster.says(0, &["rules", "set", rules.to_str().expect("a plain name")], 0, &[]).await;
    let holders = cluster.voters("p1", 3).await;
    let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
    let source = holders[0];
    let (from, to) = (format!("n{}", cluster.id(source)), format!("n{}", cluster.id(target)));
    let begun = cluster.says(0, &["move", "start", "p1", "--from", &from, "--to", &to], 0, &[]).await;
    let id: u64 = begun.split(' ').nth(1).and_then(|id| id.parse().ok()).expect("move N of p1 has begun");
    page.shows("a move that was begun elsewhere", &format!("document.querySelector('[data-move=\"{id}\"]')"))
        .await;
    page.tabs_to(&format!("Cancel move {id}")).await;
    page.presses("Enter").await;
    page.shows("what that would do", "document.querySelector('dialog[open] #confirm')").await;
    is_sound(&page, "a move that is to go back").await;
    page.tabs_to("confirm").await;
    page.presses("Enter").await;
    page.shows("the dialog to be gone", "!document.querySelector('dialog')").await;
    page.shows(
        "the move to have gone back",
        &format!("document.querySelector('[data-move=\"{id}\"][data-phase=aborted]')"),
    )
    .await;
    let mut voters = cluster.voters("p1", 3).await;
    voters.sort_unstable();
    assert!(voters.contains(&source) && !voters.contains(&target), "{voters:?}");
    cluster.says(0, &["audit"], 0, &["MoveCancel"]).await;

    // Of very many rows those in view are in the document, and the last one is a scroll away.
    let made: Vec<String> = (0..many()).map(|n| format!("q{n:05}")).collect();
    for part in made.chunks(25) {
        let making = part.iter().map(|name| client.create_map(name, 1));
        for made in futures::future::join_all(making).await {
            made.expect("a predicate is made");
        }
    }
    goes_to(&page, "Matrix", ".grid tbody .role.leader").await;
    let rows = "Number(document.querySelector('.grid').getAttribute('aria-rowcount')) - 1";
    page.shows("all of them", &format!("{rows} >= {}", made.len() + 4)).await;
    assert!(page.tells("document.querySelectorAll('.grid tbody tr').length").await.as_u64() < Some(100));
    page.tells("document.querySelector('.window').scrollTop = 1e6").await;
    let last = format!(
        "[...document.querySelectorAll('.grid tbody .name')].some(name => name.textContent === '{}')",
        made[made.len() - 1]
    );
    page.shows("the last one", &last).await;
    is_sound(&page, "the end of many rows").await;
    assert_eq!(browser.complaints(), Vec::<String>::new());
}
