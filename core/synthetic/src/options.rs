//! The command line, in QEMU's manner: one dash, a value in the next word.

use std::path::PathBuf;

use crate::pattern::Pattern;

/// What to do wrong on purpose; it has no effect on the other side of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// `xen-save-devices-state` answers with an error.
    Save,
    /// The device state that comes in is refused.
    Load,
    /// The process aborts in the middle of the load.
    Crash,
}

/// A whole command line.
#[derive(Debug)]
pub struct Options {
    pub name: String,
    pub machine: String,
    pub memory_mib: u64,
    pub area_mib: u64,
    pub vcpus: usize,
    /// Bytes rewritten a second by all vCPUs together; 0 is an idle guest.
    pub rate: u64,
    pub pattern: Pattern,
    pub seed: u64,
    pub monitors: Vec<PathBuf>,
    pub incoming: bool,
    pub stopped: bool,
    pub blocked: Vec<String>,
    pub fail: Option<Failure>,
}

/// QEMU options that take a value and mean nothing here.
const IGNORED_WITH_VALUE: &[&str] = &[
    "-accel", "-cpu", "-display", "-global", "-msg", "-sandbox", "-uuid", "-vga", "-D", "-pidfile",
];
/// QEMU options without a value that mean nothing here.
const IGNORED: &[&str] = &["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"];

impl Options {
    /// Reads the words after the program's name.
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            name: String::new(),
            machine: "synthetic".to_owned(),
            memory_mib: 128,
            area_mib: 0,
            vcpus: 1,
            rate: 40 * 1_000_000,
            pattern: Pattern::Text,
            seed: 1,
            monitors: Vec::new(),
            incoming: false,
            stopped: false,
            blocked: Vec::new(),
            fail: None,
        };
        let mut sockets: Vec<(String, PathBuf)> = Vec::new();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let option = match word.strip_prefix('-') {
                Some(rest) if rest.starts_with('-') => rest.to_owned(),
                _ => word.clone(),
            };
            if IGNORED.contains(&option.as_str()) {
                continue;
            }
            if option == "-S" {
                options.stopped = true;
                continue;
            }
            let value = words
                .next()
                .ok_or(format!("{word}: requires an argument"))?;
            let bad = |what: &str| format!("{word} {value}: {what}");
            match option.as_str() {
                "-name" => {
                    options.name = property(&value, "guest").unwrap_or(head(&value)).to_owned();
                }
                "-M" | "-machine" => {
                    options.machine = property(&value, "type").unwrap_or(head(&value)).to_owned();
                }
                "-m" => {
                    let size = property(&value, "size").unwrap_or(head(&value));
                    options.memory_mib = mebibytes(size).ok_or(bad("not a size"))?;
                }
                "-smp" => {
                    let count = property(&value, "cpus").unwrap_or(head(&value));
                    options.vcpus = count.parse().map_err(|_| bad("not a number"))?;
                }
                "-qmp" => options.monitors.push(
                    head(&value)
                        .strip_prefix("unix:")
                        .ok_or(bad("only unix:PATH"))?
                        .into(),
                ),
                "-chardev" => {
                    let id = property(&value, "id").ok_or(bad("no id"))?.to_owned();
                    if head(&value) == "socket" {
                        let path = property(&value, "path").ok_or(bad("no path"))?;
                        sockets.push((id, path.into()));
                    }
                }
                "-mon" => {
                    let id = property(&value, "chardev").unwrap_or(head(&value));
                    let socket = sockets.iter().find(|(name, _)| name == id);
                    let (_, path) = socket.ok_or(bad("no such socket chardev before it"))?;
                    options.monitors.push(path.clone());
                }
                "-incoming" if value == "defer" => options.incoming = true,
                "-incoming" => return Err(bad("only defer")),
                "-rate" => {
                    let megabytes: f64 = value.parse().map_err(|_| bad("not a number"))?;
                    if !(0.0..=1e6).contains(&megabytes) {
                        return Err(bad("out of range"));
                    }
                    options.rate = (megabytes * 1e6) as u64;
                }
                "-area" => options.area_mib = mebibytes(&value).ok_or(bad("not a size"))?,
                "-pattern" => {
                    options.pattern = Pattern::named(&value).ok_or(bad("text, random or zero"))?;
                }
                "-seed" => options.seed = value.parse().map_err(|_| bad("not a number"))?,
                "-blocked" => options.blocked.push(value),
                "-fail" => {
                    options.fail = Some(match value.as_str() {
                        "save" => Failure::Save,
                        "load" => Failure::Load,
                        "crash" => Failure::Crash,
                        _ => return Err(bad("save, load or crash")),
                    });
                }
                name if IGNORED_WITH_VALUE.contains(&name) => {}
                _ => return Err(format!("{word}: invalid option")),
            }
        }
        options.checked()
    }

    fn checked(mut self) -> Result<Self, String> {
        if !(1..=1 << 20).contains(&self.memory_mib) {
            return Err(format!("-m {}: out of range", self.memory_mib));
        }
        if !(1..=64).contains(&self.vcpus) {
            return Err(format!("-smp {}: out of range", self.vcpus));
        }
        if self.area_mib == 0 {
            self.area_mib = (self.memory_mib / 2).max(1);
        }
        if self.area_mib > self.memory_mib {
            return Err(format!("-area {}: larger than the memory", self.area_mib));
        }
        if self.monitors.is_empty() {
            return Err("-qmp unix:PATH,server=on,wait=off: is missing".to_owned());
        }
        Ok(self)
    }
}

fn head(value: &str) -> &str {
    value.split(',').next().unwrap_or_default()
}

fn property<'a>(value: &'a str, name: &str) -> Option<&'a str> {
    value
        .split(',')
        .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
}

/// `512`, `512M`, `2G`.
fn mebibytes(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'M' | b'm' => (&text[..text.len() - 1], 1),
        b'G' | b'g' => (&text[..text.len() - 1], 1024),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn reads_what_qemu_would_read() {
        let o = parse(
            "-name guest=g,debug-threads=on -M synthetic,x=y -m size=1G -smp 2 -nodefaults \
             -qmp unix:/a,server=on,wait=off -chardev socket,id=c,path=/b,server=on,wait=off \
             -mon chardev=c,mode=control -incoming defer -S -rate 2.5 -pattern zero",
        )
        .unwrap();
        assert_eq!((o.name.as_str(), o.machine.as_str()), ("g", "synthetic"));
        assert_eq!(
            (o.memory_mib, o.area_mib, o.vcpus, o.rate),
            (1024, 512, 2, 2_500_000)
        );
        assert_eq!(o.monitors, [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert!(o.incoming && o.stopped);
    }

    #[test]
    fn refuses_with_the_word_that_is_wrong() {
        for (line, word) in [
            ("-qmp unix:/a -m", "-m"),
            ("-qmp unix:/a -m x", "-m x"),
            ("-qmp tcp:/a", "-qmp tcp:/a"),
            ("-qmp unix:/a -area 4G", "-area 4096"),
            ("-qmp unix:/a -bogus 1", "-bogus"),
            ("-m 64", "-qmp"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.starts_with(word), "{line}: {error}");
        }
    }
}
