//! What can end a script, in plain data that may cross threads.

use std::path::{Path, PathBuf};

use boa_engine::ast::Position;
use boa_engine::ast::scope::Scope;
use boa_engine::error::EngineError;
use boa_engine::parser::lexer::error::Error as LexError;
use boa_engine::parser::{Error as ParseError, Parser};
use boa_engine::{Context, JsError, JsValue, Source, js_string};
use serde::{Deserialize, Serialize};

use crate::events::Failure;

/// Why a script did not run to its end.
///
/// `stack` has a line for each function that was running, the innermost first: `name (file:line:column)`, or
/// `name (native)` for one of the engine. The engine knows no position for a few kinds of expression: it then writes
/// `?` for the numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ScriptError {
    /// The file is not a script; nothing of it was run.
    #[error("{}:{line}:{column}: SyntaxError: {message}", file.display())]
    Syntax {
        /// The file, as it was given.
        file: PathBuf,
        /// Line, from 1.
        line: u32,
        /// Column, from 1.
        column: u32,
        /// What the parser expected, or found.
        message: String,
    },
    /// An exception that nobody caught.
    #[error("uncaught {}", thrown(name, message, stack))]
    Uncaught {
        /// The error's `name`; empty if what was thrown is not an error.
        name: String,
        /// The error's `message`, or the value that was thrown.
        message: String,
        /// Where it was thrown.
        stack: Vec<String>,
    },
    /// A promise was rejected, and nobody handled it by the end of the turn.
    #[error("unhandled rejection of a promise: {}", thrown(name, message, stack))]
    Unhandled {
        /// The reason's `name`; empty if it is not an error.
        name: String,
        /// The reason's `message`, or the reason.
        message: String,
        /// Where it was thrown, if it was.
        stack: Vec<String>,
    },
    /// The script recursed deeper than the thread's stack allows.
    #[error("{message}: let the script recurse less, or run it with more stack{}", lines(stack))]
    Limit {
        /// Which limit.
        message: String,
        /// Where it was reached, the innermost few.
        stack: Vec<String>,
    },
    /// The engine failed: a bug of the engine, not of the script.
    #[error("the JavaScript engine failed: {message}")]
    Engine {
        /// What it says.
        message: String,
    },
}

fn thrown(name: &str, message: &str, stack: &[String]) -> String {
    let colon = if name.is_empty() || message.is_empty() { "" } else { ": " };
    format!("{name}{colon}{message}{}", lines(stack))
}

fn lines(stack: &[String]) -> String {
    stack.iter().map(|line| format!("\n    at {line}")).collect()
}

impl ScriptError {
    /// `source` was refused with `error`. The engine's error has the position only in its text, so the parser is asked
    /// again.
    pub(crate) fn syntax(path: &Path, source: &str, error: &JsError, context: &mut Context) -> Self {
        let parsed = Parser::new(Source::from_bytes(source))
            .parse_script(&Scope::new_global(), context.interner_mut());
        let (message, position) = match parsed {
            Err(error) => (error.to_string(), position(&error)),
            Ok(_) => {
                (error.as_native().map_or(error.to_string(), |native| native.message().to_owned()), None)
            }
        };
        // No position: the file ended too early.
        let position = position.unwrap_or_else(|| {
            let last = source.lines().last().unwrap_or("");
            Position::new(source.lines().count().max(1) as u32, last.chars().count() as u32 + 1)
        });
        let (line, column) = (position.line_number(), position.column_number());
        let said_again = format!(" at line {line}, col {column}");
        let mut message = message.strip_suffix(&said_again).unwrap_or(&message).to_owned();
        let as_module = Parser::new(Source::from_bytes(source))
            .parse_module(&Scope::new_global(), context.interner_mut());
        if as_module.is_ok() {
            message.push_str(
                " (the file is a module: wrap a top-level `await` in an async function, and bundle imports into one script)",
            );
        }
        Self::Syntax { file: path.to_owned(), line, column, message }
    }

    pub(crate) fn from_failure(failure: Failure, context: &mut Context) -> Self {
        let (error, rejected) = match failure {
            Failure::Thrown(error) => (error, false),
            Failure::Rejected(reason) => (JsError::from_opaque(reason), true),
        };
        let mut stack = stack_of(&error);
        match error.as_engine() {
            Some(EngineError::RuntimeLimit(limit)) => {
                stack.truncate(6);
                return Self::Limit { message: limit.to_string(), stack };
            }
            Some(other) => return Self::Engine { message: other.to_string() },
            None => {}
        }
        let (name, message) = match error.into_opaque(context) {
            Ok(value) => name_and_message(&value, context),
            Err(error) => return Self::Engine { message: error.to_string() },
        };
        if rejected {
            Self::Unhandled { name, message, stack }
        } else {
            Self::Uncaught { name, message, stack }
        }
    }
}

/// The error's trace is public only at the end of its text.
fn stack_of(error: &JsError) -> Vec<String> {
    let text = error.to_string();
    let named =
        |line: &str| if line.starts_with(' ') { format!("<anonymous>{line}") } else { line.to_owned() };
    let mut stack: Vec<String> =
        text.lines().rev().map_while(|line| line.strip_prefix("    at ")).map(named).collect();
    stack.reverse();
    stack
}

/// Both read as a script would read them, so a class of the script's own has its own name.
fn name_and_message(value: &JsValue, context: &mut Context) -> (String, String) {
    if let Some(object) = value.as_object()
        && object.is::<boa_engine::builtins::error::Error>()
    {
        let mut text = |key| {
            let value = object.get(key, context).ok()?;
            Some(value.to_string(context).ok()?.to_std_string_lossy())
        };
        let (name, message) = (text(js_string!("name")), text(js_string!("message")));
        return (name.unwrap_or_else(|| "Error".to_owned()), message.unwrap_or_default());
    }
    (String::new(), value.display().to_string())
}

fn position(error: &ParseError) -> Option<Position> {
    match error {
        ParseError::Expected { span, .. } | ParseError::Unexpected { span, .. } => Some(span.start()),
        ParseError::General { position, .. } => Some(*position),
        ParseError::Lex { err: LexError::Syntax(_, position) } => Some(*position),
        ParseError::Lex { .. } | ParseError::AbruptEnd | ParseError::ScopeAnalysis { .. } => None,
    }
}
