//! Errors and warnings about a user's text file, with file, line, caret and fix.

use std::fmt;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use serde::Serialize;
use serde::de::DeserializeOwned;

mod spans;
mod words;

/// A text file: the name that the user typed, and its content.
#[derive(Clone, Debug)]
pub struct Source {
    /// File name as the user typed it.
    pub name: String,
    /// The whole text. Spans of diagnostics are byte ranges of it.
    pub text: String,
}

/// Severity of a diagnostic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file cannot be used.
    Error,
    /// The file can be used, but a part of it has a result that its author may not expect.
    Warning,
}

/// An error or a warning about one file.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnostic {
    /// Whether the file can be used.
    pub severity: Severity,
    /// File name as the user typed it.
    pub file: String,
    /// Line, counted from 1; 0 for the whole file.
    pub line: usize,
    /// What is wrong, without file and line.
    pub message: String,
    /// The fix, as an instruction.
    pub help: Option<String>,
    #[serde(skip)]
    snippet: Option<(String, Range<usize>)>,
}

impl Diagnostic {
    /// Makes a diagnostic about the whole file.
    #[must_use]
    pub fn whole_file(severity: Severity, file: &str, message: String, help: Option<String>) -> Self {
        Self { severity, file: file.to_owned(), line: 0, message, help, snippet: None }
    }

    /// Makes a diagnostic about a span (in bytes) of the file.
    #[must_use]
    pub fn at(severity: Severity, source: &Source, span: Range<usize>, message: String, help: Option<String>) -> Self {
        let end = floor_char(&source.text, span.end);
        let start = floor_char(&source.text, span.start.min(end));
        let line = source.text[..start].matches('\n').count() + 1;
        Self {
            severity,
            file: source.name.clone(),
            line,
            message,
            help,
            snippet: Some((source.text.clone(), start..end)),
        }
    }

    /// Returns the diagnostic with the lines of the file and a caret, for a terminal.
    #[must_use]
    pub fn render(&self, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = self.headline();
        let mut group =
            level.primary_title(title.as_str()).elements(Vec::<Snippet<annotate_snippets::Annotation>>::new());
        if let Some((text, span)) = &self.snippet {
            group = group.element(
                Snippet::source(text.as_str())
                    .path(self.file.as_str())
                    .annotation(AnnotationKind::Primary.span(span.clone())),
            );
        }
        if let Some(help) = &self.help {
            group = group.element(Level::HELP.message(help.as_str()));
        }
        renderer.render(&[group]).clone()
    }

    fn headline(&self) -> String {
        if self.line == 0 {
            format!("{}: {}", self.file, self.message)
        } else {
            format!("{}:{}: {}", self.file, self.line, self.message)
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.headline())?;
        match &self.help {
            Some(help) => write!(f, " ({help})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Diagnostic {}

/// Diagnostics, in the order of the files' lines.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// Returns whether a diagnostic is an error.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.0.iter().any(|d| d.severity == Severity::Error)
    }
}

impl From<Diagnostic> for Diagnostics {
    fn from(d: Diagnostic) -> Self {
        Self(vec![d])
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, d) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{d}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

/// Parses a TOML file.
///
/// # Errors
/// If the bytes are not UTF-8, not TOML, or have unknown keys.
pub(crate) fn parse<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<(T, Source), Box<Diagnostic>> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(e) => {
            return Err(Box::new(Diagnostic::whole_file(
                Severity::Error,
                name,
                format!("not UTF-8 text at byte {}", e.valid_up_to()),
                Some("save the file as UTF-8".to_owned()),
            )));
        }
    };
    let source = Source { name: name.to_owned(), text };
    match toml::from_str(&source.text) {
        Ok(value) => Ok((value, source)),
        Err(e) => {
            let span = e.span().unwrap_or(0..0);
            let (message, help) = words::plain::<T>(e.message(), source.path_at(&span).as_deref());
            Err(Box::new(Diagnostic::at(Severity::Error, &source, span, message, help)))
        }
    }
}

/// Returns a question with the candidate that is most similar to `given`, if one is similar enough.
pub(crate) fn nearest<'a>(given: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|c| (strsim::damerau_levenshtein(given, c), c))
        .filter(|(d, c)| *d <= (c.len().max(given.len()) / 3).max(1))
        .min()
        .map(|(_, c)| format!("did you mean `{c}`?"))
}

fn floor_char(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
