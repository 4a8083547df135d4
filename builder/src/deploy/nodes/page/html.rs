//! Pages of the steering. This program makes all of their bytes.

use std::fmt::Write as _;

/// What the browser may load for these pages: nothing but their own style.
pub(super) const POLICY: &str =
    "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// Style of the pages.
pub(super) const STYLE: &str = "\
:root { color-scheme: light dark; --back: #f3f5f8; --card: #fff; --edge: #dce1e8; --text: #17202b; --dim: #556070;
  --accent: #1b5bb8; --bad: #b8232c; --mark: #fff; --code: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --back: #0e1318; --card: #161c23; --edge: #2a3440; --text: #e7ecf2;
  --dim: #a2afbd; --accent: #7db4ff; --bad: #ff8585; --mark: #10161c; --code: #222b35; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 Inter, system-ui, sans-serif; }
main { max-width: 34rem; margin: 12vh auto 2rem; padding: 1.75rem 2rem; background: var(--card);
  border: 1px solid var(--edge); border-radius: 14px; }
h1 { margin: 0 0 .75rem; font-size: 1.35rem; line-height: 1.3; }
p { margin: .5rem 0; }
.dim { color: var(--dim); font-size: .92rem; }
.bad { color: var(--bad); font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap; }
code { background: var(--code); border-radius: 5px; padding: .15em .45em; overflow-wrap: anywhere;
  font: .92em ui-monospace, Menlo, Consolas, monospace; }
form { margin-top: 1.4rem; }
button { font: inherit; font-weight: 650; color: var(--mark); background: var(--accent); border: 0; border-radius: 9px;
  padding: .55rem 1.4rem; cursor: pointer; animation: read 1s steps(1, end); }
@keyframes read { from { visibility: hidden; } }
button:focus-visible { outline: 3px solid var(--text); outline-offset: 2px; }
";

/// A page.
pub(super) struct Document<'a> {
    pub(super) title: &'a str,
    /// HTML.
    pub(super) body: String,
    /// Seconds after which the browser loads the page again.
    pub(super) refresh: Option<u8>,
}

impl Document<'_> {
    /// Returns the page as HTML.
    pub(super) fn html(&self) -> String {
        let refresh = self
            .refresh
            .map(|seconds| format!("<meta http-equiv=\"refresh\" content=\"{seconds}\">\n"))
            .unwrap_or_default();
        let title = escape(self.title);
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\">\n{refresh}<title>{title}</title>\n<link rel=\"stylesheet\" \
             href=\"style.css\">\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{}\n</main>\n</body>\n</html>\n",
            self.body
        )
    }
}

/// Returns a text as HTML.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Adds a paragraph with a text.
pub(super) fn paragraph(body: &mut String, class: &str, text: &str) {
    let _ = writeln!(body, "<p class=\"{class}\">{}</p>", escape(text));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_do_not_become_markup() {
        let mut body = String::new();
        paragraph(&mut body, "bad", "<b>\"it's\" & more</b>");
        assert_eq!(body, "<p class=\"bad\">&lt;b&gt;&quot;it&#39;s&quot; &amp; more&lt;/b&gt;</p>\n");
        let html = Document { title: "<x>", body, refresh: Some(1) }.html();
        assert!(html.contains("<title>&lt;x&gt;</title>") && html.contains("content=\"1\""));
    }
}
