//! The human monitor, as far as it is used through `human-monitor-command`.

use crate::commands::Control;
use crate::machine::Machine;
use crate::memory;

/// `info ramblock`.
pub fn ram_blocks(machine: &Machine, end: &str) -> String {
    memory::table(&[&machine.ram, &machine.rom], end)
}

/// Runs a line; errors are text here, too.
pub fn run(control: &Control, line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        [] => String::new(),
        ["info", "ramblock"] => ram_blocks(&control.machine, "\r\n"),
        // No NIC; QEMU prints nothing then, too.
        ["info", "network"] => String::new(),
        ["info", "version"] => "10.0.2\r\n".to_owned(),
        ["gpa2hva", address] => host_address(&control.machine, address),
        ["qemu-io", node, "aio_flush"] => match control.nodes.iter().any(|name| name == node) {
            // No disk, so nothing is ever in flight.
            true => String::new(),
            false => format!("Error: Cannot find device='' nor node-name='{node}'\r\n"),
        },
        [first, ..] => format!("unknown command: '{first}'\r\n"),
    }
}

fn host_address(machine: &Machine, text: &str) -> String {
    let digits = text.strip_prefix("0x");
    let address = match digits {
        Some(digits) => usize::from_str_radix(digits, 16),
        None => text.parse(),
    };
    match address {
        Ok(address) if address < machine.ram.length => {
            let (name, host) = (machine.ram.name, machine.ram.address() + address);
            format!("Host virtual address for {address:#x} ({name}) is {host:#x}\r\n")
        }
        Ok(address) => format!("No memory is mapped at address {address:#x}\r\n"),
        Err(_) => "invalid char in expression\r\n".to_owned(),
    }
}
