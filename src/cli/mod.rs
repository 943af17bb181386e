//! The command line: one file per command, each with its definitions and the few calls that carry it out.

mod ablate;
mod args;
mod doctor;
mod eval;
mod export;
mod output;
mod predict;
mod prepare;
mod report;
mod signals;
mod train;

use std::io::Write;
use std::panic::PanicHookInfo;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::{Error, Kind, Result};
use crate::progress::{Progress, Verbosity};

const EXIT_CODES: &str = "\
Exit codes:
    0  success
    1  a defect of this program
    2  the command line asks for something impossible
    3  a file from outside (image, archive, dataset, checkpoint, adapter) is missing or malformed
    4  the operating system refused: unwritable output, full disk, failed read
    5  training diverged: a loss or gradient is not finite
    6  the compute device is missing, too small or failed
    7  another process holds the output folder
  130  interrupted (Ctrl-C, SIGTERM); the same command continues

Progress goes to standard error, results to standard output.";

/// How much of full fine-tuning does LoRA keep, at which rank and alpha? A native SegFormer trainer that answers in
/// minutes, without Python.
#[derive(Parser)]
#[command(name = "segpeft-native", version, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand)]
enum Command {
    Prepare(prepare::Prepare),
    Train(train::Train),
    Ablate(ablate::Ablate),
    Eval(eval::Eval),
    Predict(predict::Predict),
    Export(export::Export),
    Report(report::Report),
    Doctor(doctor::Doctor),
}

/// What every command takes.
#[derive(Args)]
#[command(next_help_heading = "General")]
struct Common {
    /// Warnings and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Also every epoch of a grid, every adapted module, planned memory
    #[arg(short, long, global = true)]
    verbose: bool,
    /// Print the result as one JSON document
    #[arg(long, global = true)]
    json: bool,
    /// Threads of the CPU [default: one per core]
    #[arg(long, global = true, value_name = "N", value_parser = args::threads)]
    threads: Option<usize>,
}

/// Where a command shows its progress and leaves its result.
struct Context {
    progress: Progress,
    json: bool,
}

/// Runs the program and returns its exit code.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        complain(&defect(info));
        std::process::exit(i32::from(Kind::Internal as u8));
    }));
    // A value such as -1 shall meet its flag's own check.
    let numbers = |arg: clap::Arg| match arg.get_action().takes_values() {
        true => arg.allow_negative_numbers(true),
        false => arg,
    };
    let mut command = Cli::command().mut_subcommands(|command| command.mut_args(numbers));
    let parsed = command.try_get_matches_from_mut(std::env::args_os()).and_then(|m| Cli::from_arg_matches(&m));
    let outcome = match parsed {
        Ok(cli) => run(cli),
        Err(error) if is_help(error.kind()) => {
            // Nothing is left to do when the reader of the help has gone.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(Kind::Usage as u8) } else { ExitCode::SUCCESS };
        }
        Err(error) => Err(Error::usage(one_line(&error.render().to_string()))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error.to_string());
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let verbosity = match (cli.common.quiet, cli.common.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    };
    let context = Context { progress: Progress::new(verbosity), json: cli.common.json };
    if let Some(threads) = cli.common.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .map_err(|e| Error::new(Kind::Device, format!("cannot start {threads} threads: {e}; lower --threads")))?;
    }
    match cli.command {
        Command::Prepare(command) => command.run(&context),
        Command::Train(command) => command.run(&context),
        Command::Ablate(command) => command.run(&context),
        Command::Eval(command) => command.run(&context),
        Command::Predict(command) => command.run(&context),
        Command::Export(command) => command.run(&context),
        Command::Report(command) => command.run(&context),
        Command::Doctor(command) => command.run(&context),
    }
}

fn is_help(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    )
}

/// clap's message without its usage lines, on one line.
fn one_line(message: &str) -> String {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let mut parts = message.split("\n\n").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    let first = parts.next().unwrap_or_default();
    let tips: Vec<String> = parts.filter_map(|part| part.strip_prefix("tip: ").map(|tip| format!("; {tip}"))).collect();
    format!("{first}{} (see --help)", tips.concat())
}

fn complain(message: &str) {
    let _ = writeln!(std::io::stderr(), "error: {message}");
}

fn defect(info: &PanicHookInfo) -> String {
    let what = info.payload_as_str().unwrap_or("no message").split_whitespace().collect::<Vec<_>>().join(" ");
    let place = info.location().map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
    format!(
        "defect in segpeft-native {}{place}: {what}; please report it with the command that led here",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn claps_messages_become_one_line() {
        let error = |args: &[&str]| match Cli::try_parse_from([&["segpeft-native"], args].concat()) {
            Ok(_) => panic!("accepted {args:?}"),
            Err(error) => one_line(&error.render().to_string()),
        };
        let missing = error(&["train"]);
        assert!(missing.starts_with("the following required arguments were not provided: --data"), "{missing}");
        let none = error(&["--json"]);
        assert!(none.contains("requires a subcommand") && none.contains("ablate") && !none.contains('\n'), "{none}");
        let typo = error(&["report", "--jsn", "x"]);
        assert!(typo.contains("'--jsn'") && typo.contains("'--json'") && !typo.contains('\n'), "{typo}");
    }

    #[test]
    fn defaults_in_the_help_are_the_defaults() {
        let help = Cli::command().find_subcommand_mut("train").expect("train exists").render_long_help().to_string();
        let options = crate::train::options::TrainOptions::default();
        for (flag, value) in [
            ("--epochs", options.epochs.to_string()),
            ("--lr", options.lr.to_string()),
            ("--batch-size", options.batch_size.to_string()),
            ("--grad-accum", options.grad_accum.to_string()),
            ("--eval-batch-size", options.eval_batch_size.to_string()),
            ("--warmup-ratio", options.warmup_ratio.to_string()),
            ("--weight-decay", options.weight_decay.to_string()),
            ("--patience", options.patience.to_string()),
            ("--seed", options.seed.to_string()),
        ] {
            let entry = help.split(&format!("{flag} <")).nth(1).unwrap_or_else(|| panic!("{flag} has no entry"));
            let entry = &entry[..entry.find("\n      --").unwrap_or(entry.len())];
            assert!(entry.contains(&format!("[default: {value}]")), "{flag}: {entry}");
        }
    }
}
