//! The device state as a stream of QEMU's own shape: magic, version, one section with its footer,
//! the EOF byte. What comes in must have a configuration section behind the version, as QEMU wants
//! it too, and should have a description behind the EOF byte.

use std::io::{self, Read};
use std::sync::atomic::Ordering::Relaxed;

use crate::machine::Machine;

const MAGIC: &[u8; 4] = b"QEVM";
const VERSION: u32 = 3;
const SECTION_EOF: u8 = 0x00;
const SECTION_FULL: u8 = 0x04;
const SECTION_DESCRIPTION: u8 = 0x06;
const SECTION_CONFIGURATION: u8 = 0x07;
const SECTION_FOOTER: u8 = 0x7e;
const SECTION_ID: u32 = 1;
const NAME: &[u8] = b"synthetic";
const NAME_MAX: usize = 256;
const DESCRIPTION_MAX: u64 = 1 << 20;

/// The state of a halted machine.
pub fn save(machine: &Machine) -> Vec<u8> {
    let mut out = Vec::with_capacity(128 + machine.generations.len() * 4);
    out.extend(MAGIC);
    out.extend(VERSION.to_be_bytes());
    out.push(SECTION_FULL);
    out.extend(SECTION_ID.to_be_bytes());
    out.push(NAME.len() as u8);
    out.extend(NAME);
    out.extend(0u32.to_be_bytes()); // instance
    out.extend(1u32.to_be_bytes()); // version of the section
    out.extend(shape(machine));
    for vcpu in &machine.vcpus {
        for field in [&vcpu.random, &vcpu.writes, &vcpu.checked, &vcpu.corrupt] {
            out.extend(field.load(Relaxed).to_be_bytes());
        }
    }
    for generation in &machine.generations {
        out.extend(generation.load(Relaxed).to_be_bytes());
    }
    out.push(SECTION_FOOTER);
    out.extend(SECTION_ID.to_be_bytes());
    out.push(SECTION_EOF);
    out
}

/// What must be the same on both sides: pattern, area, vCPUs.
fn shape(machine: &Machine) -> Vec<u8> {
    let mut out = vec![machine.pattern.code()];
    out.extend(machine.area_pages.to_be_bytes());
    out.extend((machine.vcpus.len() as u32).to_be_bytes());
    out
}

/// Reads a state into a halted machine. On error the machine is in no state to run.
pub fn load(machine: &Machine, name: &str, input: &mut impl Read) -> Result<(), String> {
    let mut input = Input(input);
    if &input.bytes::<4>()? != MAGIC {
        return Err("Not a migration stream".to_owned());
    }
    let version = input.be32()?;
    if version != VERSION {
        return Err(format!("Unsupported migration stream version {version}"));
    }
    if input.byte()? != SECTION_CONFIGURATION {
        return Err("Configuration section missing".to_owned());
    }
    let theirs = input.text()?;
    if theirs != name {
        return Err(format!(
            "Machine type received is '{theirs}' and local is '{name}'"
        ));
    }
    let mut seen = false;
    loop {
        match input.byte()? {
            SECTION_FULL if !seen => section(machine, &mut input)?,
            SECTION_EOF => break,
            kind => return Err(format!("Unknown savevm section type {kind}")),
        }
        seen = true;
    }
    if !seen {
        return Err("No section 'synthetic' in the stream".to_owned());
    }
    match input.byte() {
        Ok(SECTION_DESCRIPTION) => {
            let length = u64::from(input.be32()?);
            input.skip(length)?;
        }
        _ => eprintln!("Expected vmdescription section, but got 0"),
    }
    machine.read_ring();
    Ok(())
}

fn section(machine: &Machine, input: &mut Input<impl Read>) -> Result<(), String> {
    let id = input.be32()?;
    let mut name = vec![0; usize::from(input.byte()?)];
    input.fill(&mut name)?;
    let (instance, version) = (input.be32()?, input.be32()?);
    if name != NAME || instance != 0 {
        let name = String::from_utf8_lossy(&name);
        return Err(format!("Unknown section '{name}' instance {instance}"));
    }
    if version != 1 {
        return Err(format!("unsupported version {version} for 'synthetic'"));
    }
    let mut theirs = shape(machine);
    input.fill(&mut theirs)?;
    if theirs != shape(machine) {
        return Err("pattern, area or number of vCPUs differ from the source's".to_owned());
    }
    for vcpu in &machine.vcpus {
        for field in [&vcpu.random, &vcpu.writes, &vcpu.checked, &vcpu.corrupt] {
            field.store(u64::from_be_bytes(input.bytes()?), Relaxed);
        }
    }
    let mut generations = vec![0; machine.generations.len() * 4];
    input.fill(&mut generations)?;
    for (own, theirs) in machine.generations.iter().zip(generations.chunks_exact(4)) {
        own.store(
            u32::from_be_bytes(std::array::from_fn(|i| theirs[i])),
            Relaxed,
        );
    }
    if input.byte()? != SECTION_FOOTER || input.be32()? != id {
        return Err("Missing section footer for synthetic".to_owned());
    }
    Ok(())
}

/// Big-endian fields from a stream.
struct Input<R>(R);

impl<R: Read> Input<R> {
    fn fill(&mut self, out: &mut [u8]) -> Result<(), String> {
        self.0
            .read_exact(out)
            .map_err(|error| format!("load of migration failed: {error}"))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.bytes::<1>().map(|[byte]| byte)
    }

    fn be32(&mut self) -> Result<u32, String> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.be32()? as usize;
        if length > NAME_MAX {
            return Err(format!("a name of {length} bytes"));
        }
        let mut out = vec![0; length];
        self.fill(&mut out)?;
        String::from_utf8(out).map_err(|_| "a name that is no text".to_owned())
    }

    fn skip(&mut self, length: u64) -> Result<(), String> {
        if length > DESCRIPTION_MAX {
            return Err(format!("a description of {length} bytes"));
        }
        let skipped = io::copy(&mut (&mut self.0).take(length), &mut io::sink());
        match skipped {
            Ok(n) if n == length => Ok(()),
            _ => Err("load of migration failed: the stream is cut off".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use std::sync::Arc;

    fn machine(line: &str) -> Arc<Machine> {
        let line = format!("-m 2 -area 1 -qmp unix:/x {line}");
        let options = Options::parse(line.split_whitespace().map(str::to_owned)).unwrap();
        Machine::start(&options).unwrap()
    }

    fn spliced(state: &[u8]) -> Vec<u8> {
        let mut out = state[..8].to_vec();
        out.push(SECTION_CONFIGURATION);
        out.extend(9u32.to_be_bytes());
        out.extend(b"synthetic");
        out.extend(&state[8..]);
        out.extend([SECTION_DESCRIPTION, 0, 0, 0, 2, b'{', b'}']);
        out
    }

    #[test]
    fn a_state_comes_back_as_it_was() {
        let source = machine("-seed 7");
        let state = save(&source);
        let target = machine("-incoming defer");
        load(&target, "synthetic", &mut spliced(&state).as_slice()).unwrap();
        // Page 0 has not been copied, which the load finds; the rest of the state is equal.
        assert_eq!(target.check().corrupt, 1);
        target.vcpus[0].corrupt.store(0, Relaxed);
        assert!(save(&target) == state);
    }

    #[test]
    fn refuses_anything_else() {
        let source = machine("");
        let state = save(&source);
        let good = spliced(&state);
        let target = machine("-incoming defer");
        let refuse = |bytes: &[u8], why: &str| {
            let error = load(&target, "synthetic", &mut &bytes[..]).unwrap_err();
            assert!(error.contains(why), "{error}");
        };
        refuse(&state, "Configuration section missing");
        for cut in 0..good.len() - 7 {
            refuse(&good[..cut], "load of migration failed");
        }
        let mut footer = good.clone();
        let at = footer.len() - 13;
        assert_eq!(footer[at], SECTION_FOOTER);
        footer[at] ^= 1;
        refuse(&footer, "footer");
        assert!(
            load(&target, "q35", &mut good.as_slice())
                .unwrap_err()
                .contains("'q35'")
        );
        let other = machine("-incoming defer -smp 2");
        let error = load(&other, "synthetic", &mut good.as_slice()).unwrap_err();
        assert!(error.contains("vCPUs differ"), "{error}");
    }
}
