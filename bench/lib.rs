//! Comparisons with peers. Each is a bench target; `docs/figures.md` has the commands and what they printed.
