//! The synthetic guest: a small program whose memory, monitor and device state are those of a
//! QEMU to anyone who moves it, and whose threads check each page before they rewrite it.
//!
//! It stands in for a guest in fast tests of the core and on machines without QEMU; never where a
//! promise about real guests is tested.

mod arguments;
mod commands;
mod human;
mod machine;
mod memory;
mod monitor;
mod options;
mod pattern;
mod state;

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use commands::{Control, version};
use machine::Machine;
use monitor::Monitors;
use options::Options;

fn run() -> Result<(), String> {
    let options = Options::parse(env::args().skip(1))?;
    let machine = Machine::start(&options).map_err(|error| format!("cannot start: {error}"))?;
    let mut monitors = Monitors::listen(&options.monitors, version())?;
    // Tells whoever started it that the monitor can be connected to; nobody need read it.
    let _ = writeln!(io::stdout(), "listening");
    let mut control = Control::new(machine, options);
    monitors
        .serve(&mut control)
        .map_err(|error| format!("monitor: {error}"))
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ferry-synthetic: {error}");
            ExitCode::FAILURE
        }
    }
}
