//! Whether the command line accepts a command, for tests of the texts that quote it.

use clap::Parser as _;
use clap::error::ErrorKind;

use super::args::Cli;

/// Word in a quoted command that stands for a value.
const VALUE: &str = "VALUE";

/// Returns why the command line does not accept a command. A command that is not `whole` may lack arguments. The word
/// `VALUE` stands for any value.
///
/// # Errors
/// The first line of the parser's error.
pub fn accepts(words: &[String], whole: bool) -> Result<(), String> {
    use ErrorKind::{
        DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion, InvalidValue, MissingRequiredArgument,
        MissingSubcommand, ValueValidation,
    };
    let Err(error) = Cli::try_parse_from(words) else { return Ok(()) };
    let accepted = match error.kind() {
        DisplayHelp | DisplayVersion => true,
        MissingRequiredArgument | MissingSubcommand | DisplayHelpOnMissingArgumentOrSubcommand => !whole,
        InvalidValue | ValueValidation => words.iter().any(|word| word == VALUE),
        _ => false,
    };
    if accepted { Ok(()) } else { Err(error.to_string().lines().next().unwrap_or_default().to_owned()) }
}
