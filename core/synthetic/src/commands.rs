//! The QMP commands that a mover of guests uses, answered as QEMU 10.0 answers them.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{OFlags, fcntl_getfl};
use serde_json::{Value, json};

use crate::arguments::{
    Arguments, COMMANDS, missing, no_descriptor, no_device, no_such_descriptor, not_found,
};
use crate::human;
use crate::machine::Machine;
use crate::monitor::{Command, Commands, Outcome, QmpError, event};
use crate::options::{Failure, Options};
use crate::state;

/// QEMU's run states, as far as they occur here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RunState {
    Prelaunch,
    Running,
    Paused,
    InMigrate,
}

/// The version that `query-version` and the greeting tell.
pub fn version() -> Value {
    let package = concat!("ferry-synthetic ", env!("CARGO_PKG_VERSION"));
    json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": package})
}

/// A machine under its monitors.
pub struct Control {
    pub machine: Arc<Machine>,
    options: Options,
    state: RunState,
    /// Whether it runs once what comes in has come.
    autostart: bool,
    pub nodes: Vec<String>,
    fd_sets: BTreeMap<u64, Vec<OwnedFd>>,
    named: BTreeMap<String, OwnedFd>,
    capabilities: BTreeMap<String, bool>,
    migration: Value,
    load: Option<Load>,
}

/// A load that waits for its command's reply to be sent.
struct Load {
    source: File,
    exit_on_error: bool,
}

impl Control {
    /// A machine as it is right after the start.
    pub fn new(machine: Arc<Machine>, options: Options) -> Self {
        let mut control = Self {
            machine,
            state: if options.incoming {
                RunState::InMigrate
            } else {
                RunState::Prelaunch
            },
            autostart: !options.stopped,
            nodes: Vec::new(),
            fd_sets: BTreeMap::new(),
            named: BTreeMap::new(),
            capabilities: BTreeMap::new(),
            migration: json!({}),
            load: None,
            options,
        };
        if !control.options.incoming && control.autostart {
            control.resume(&mut Vec::new());
        }
        control
    }

    fn resume(&mut self, events: &mut Vec<Value>) {
        events.push(event("RESUME", None));
        self.state = RunState::Running;
        self.machine.resume();
    }

    fn pause(&mut self, events: &mut Vec<Value>) {
        if self.state == RunState::Running {
            self.machine.pause();
            self.state = RunState::Paused;
            events.push(event("STOP", None));
        }
    }

    fn dispatch(
        &mut self,
        command: &mut Command,
        events: &mut Vec<Value>,
    ) -> Result<Value, QmpError> {
        let name = command.name.as_str();
        let mut arguments = Arguments::known(name, std::mem::take(&mut command.arguments))?;
        Ok(match name {
            "qmp_capabilities" => {
                let description = "Capabilities negotiation is already complete, command ignored";
                return Err(QmpError {
                    class: "CommandNotFound",
                    description: description.to_owned(),
                });
            }
            "query-version" => version(),
            "query-name" if self.options.name.is_empty() => json!({}),
            "query-name" => json!({"name": self.options.name}),
            "query-status" => {
                let running = self.state == RunState::Running;
                json!({"status": self.status(), "running": running})
            }
            "query-uuid" => json!({"UUID": "00000000-0000-0000-0000-000000000000"}),
            "query-kvm" => json!({"enabled": false, "present": false}),
            "query-commands" => COMMANDS
                .iter()
                .map(|(name, _)| json!({"name": name}))
                .collect(),
            "query-block"
            | "query-named-block-nodes"
            | "query-rx-filter"
            | "query-pci"
            | "query-chardev"
            | "query-iothreads"
            | "query-hotpluggable-cpus" => json!([]),
            "query-cpus-fast" => self.cpus(),
            "query-fdsets" => self.fd_sets(),
            "query-balloon" => {
                return Err(QmpError {
                    class: "DeviceNotActive",
                    description: "No balloon device has been activated".to_owned(),
                });
            }
            "query-migrate" => self.query_migrate(),
            "query-migrate-capabilities" => (self.capabilities.iter())
                .map(|(name, on)| json!({"capability": name, "state": on}))
                .collect(),
            "migrate-set-capabilities" => {
                for item in arguments.list("capabilities")? {
                    let (name, on) = (item["capability"].as_str(), item["state"].as_bool());
                    let (Some(name), Some(on)) = (name, on) else {
                        return Err(QmpError::generic("Parameter 'capability' is missing"));
                    };
                    self.capabilities.insert(name.to_owned(), on);
                }
                json!({})
            }
            "migrate-set-parameters" => json!({}),
            "x-query-ramblock" => {
                json!({"human-readable-text": human::ram_blocks(&self.machine, "\n")})
            }
            "human-monitor-command" => {
                let line = arguments.text("command-line")?;
                json!(human::run(self, &line))
            }
            "qom-get" => {
                let (path, property) = (arguments.text("path")?, arguments.text("property")?);
                self.qom_get(&path, &property)?
            }
            "qom-list" => qom_list(&arguments.text("path")?)?,
            "stop" => {
                if self.state == RunState::InMigrate {
                    self.autostart = false;
                }
                self.pause(events);
                json!({})
            }
            "cont" => {
                match self.state {
                    RunState::InMigrate => self.autostart = true,
                    RunState::Running => {}
                    _ => self.resume(events),
                }
                json!({})
            }
            "add-fd" => self.add_fd(&mut arguments, command)?,
            "remove-fd" => self.remove_fd(&mut arguments)?,
            "getfd" => {
                let name = arguments.text("fdname")?;
                let descriptor = command.descriptors.pop_front().ok_or_else(no_descriptor)?;
                self.named.insert(name, descriptor);
                json!({})
            }
            "closefd" => {
                let name = arguments.text("fdname")?;
                self.named
                    .remove(&name)
                    .ok_or_else(|| no_such_descriptor(&name))?;
                json!({})
            }
            "blockdev-add" => self.blockdev_add(&mut arguments)?,
            "blockdev-del" => {
                let name = arguments.text("node-name")?;
                let at = self
                    .nodes
                    .iter()
                    .position(|node| *node == name)
                    .ok_or_else(|| {
                        QmpError::generic(format!("Failed to find node with node-name='{name}'"))
                    })?;
                self.nodes.remove(at);
                json!({})
            }
            "xen-save-devices-state" => self.save(&mut arguments, events)?,
            "migrate-incoming" => self.migrate_incoming(&mut arguments)?,
            "x-synthetic-check" => self.check(&mut arguments)?,
            _ => {
                return Err(not_found(name));
            }
        })
    }

    fn status(&self) -> &'static str {
        match self.state {
            RunState::Prelaunch => "prelaunch",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::InMigrate => "inmigrate",
        }
    }

    fn cpus(&self) -> Value {
        (self.machine.vcpus.iter().enumerate())
            .map(|(index, vcpu)| {
                json!({
                    "cpu-index": index,
                    "qom-path": format!("/machine/unattached/device[{index}]"),
                    "thread-id": vcpu.thread.load(Relaxed),
                    "target": "x86_64",
                })
            })
            .collect()
    }

    fn query_migrate(&self) -> Value {
        let mut answer = self.migration.clone();
        if !self.options.blocked.is_empty() {
            answer["blocked-reasons"] = json!(self.options.blocked);
        }
        answer
    }

    fn qom_get(&self, path: &str, property: &str) -> Result<Value, QmpError> {
        match (path, property) {
            ("/machine", "type") => Ok(json!(format!("{}-machine", self.options.machine))),
            ("/machine", _) => {
                let text = format!(
                    "Property '{}-machine.{property}' not found",
                    self.options.machine
                );
                Err(QmpError::generic(text))
            }
            _ => Err(no_device(path)),
        }
    }

    fn fd_sets(&self) -> Value {
        (self.fd_sets.iter())
            .map(|(id, fds)| {
                let fds: Value = fds.iter().map(|fd| json!({"fd": fd.as_raw_fd()})).collect();
                json!({"fdset-id": id, "fds": fds})
            })
            .collect()
    }

    fn add_fd(
        &mut self,
        arguments: &mut Arguments,
        command: &mut Command,
    ) -> Result<Value, QmpError> {
        let wanted = arguments.number("fdset-id")?;
        let descriptor = command.descriptors.pop_front().ok_or_else(no_descriptor)?;
        let number = descriptor.as_raw_fd();
        let free = || {
            (0..)
                .find(|id| !self.fd_sets.contains_key(id))
                .unwrap_or_default()
        };
        let id = wanted.unwrap_or_else(free);
        self.fd_sets.entry(id).or_default().push(descriptor);
        Ok(json!({"fd": number, "fdset-id": id}))
    }

    fn remove_fd(&mut self, arguments: &mut Arguments) -> Result<Value, QmpError> {
        let id = arguments
            .number("fdset-id")?
            .ok_or_else(|| missing("fdset-id"))?;
        let unknown = |what: String| no_such_descriptor(&what);
        match arguments.number("fd")? {
            None => {
                self.fd_sets
                    .remove(&id)
                    .ok_or_else(|| unknown(format!("fdset-id:{id}")))?;
            }
            Some(number) => {
                let fds = self.fd_sets.get_mut(&id);
                let at = fds
                    .as_ref()
                    .and_then(|fds| fds.iter().position(|fd| fd.as_raw_fd() as u64 == number));
                let (Some(fds), Some(at)) = (fds, at) else {
                    return Err(unknown(format!("fdset-id:{id}, fd:{number}")));
                };
                fds.remove(at);
                if fds.is_empty() {
                    self.fd_sets.remove(&id);
                }
            }
        }
        Ok(json!({}))
    }

    fn blockdev_add(&mut self, arguments: &mut Arguments) -> Result<Value, QmpError> {
        let driver = arguments.text("driver")?;
        let name = arguments.text("node-name")?;
        if driver != "null-co" {
            let text = format!("Parameter 'driver' does not accept value '{driver}'");
            return Err(QmpError::generic(text));
        }
        if self.nodes.contains(&name) {
            let text = format!("Duplicate nodes with node-name='{name}'");
            return Err(QmpError::generic(text));
        }
        self.nodes.push(name);
        Ok(json!({}))
    }

    fn save(
        &mut self,
        arguments: &mut Arguments,
        events: &mut Vec<Value>,
    ) -> Result<Value, QmpError> {
        let filename = arguments.text("filename")?;
        if self.options.fail == Some(Failure::Save) {
            return Err(QmpError::generic(
                "Error while writing VM state: as asked for by -fail",
            ));
        }
        let was_running = self.state == RunState::Running;
        let mut target = self.open_for_writing(&filename)?;
        self.pause(events);
        let written = target.write_all(&state::save(&self.machine));
        if was_running {
            self.resume(events);
        }
        written
            .map(|()| json!({}))
            .map_err(|error| QmpError::generic(format!("Error while writing VM state: {error}")))
    }

    /// `/dev/fdset/N` needs a descriptor that is open for writing only: QEMU compares the modes.
    fn open_for_writing(&self, filename: &str) -> Result<File, QmpError> {
        let failed = |why: String| QmpError::generic(format!("Could not open '{filename}': {why}"));
        let Some(set) = filename.strip_prefix("/dev/fdset/") else {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .open(filename);
            return file.map_err(|error| failed(error.to_string()));
        };
        let id: Option<u64> = set.parse().ok();
        let fds = id.and_then(|id| self.fd_sets.get(&id));
        let fds = fds.ok_or_else(|| failed("No such file or directory".to_owned()))?;
        let writable = |fd: &&OwnedFd| {
            fcntl_getfl(fd).is_ok_and(|flags| flags & OFlags::ACCMODE == OFlags::WRONLY)
        };
        let fd = fds
            .iter()
            .find(writable)
            .ok_or_else(|| failed("Permission denied".to_owned()))?;
        fd.try_clone()
            .map(File::from)
            .map_err(|error| failed(error.to_string()))
    }

    fn migrate_incoming(&mut self, arguments: &mut Arguments) -> Result<Value, QmpError> {
        let uri = arguments.text("uri")?;
        let exit_on_error = arguments.flag("exit-on-error")?.unwrap_or(true);
        if !self.options.incoming {
            let text = "'-incoming' was not specified on the command line";
            return Err(QmpError::generic(text));
        }
        if self.state != RunState::InMigrate || self.load.is_some() {
            return Err(QmpError::generic(
                "The incoming migration has already been started",
            ));
        }
        let name = uri
            .strip_prefix("fd:")
            .ok_or_else(|| QmpError::generic(format!("unknown migration protocol: {uri}")))?;
        let source = self.named.remove(name).ok_or_else(|| {
            QmpError::generic(format!("File descriptor named '{name}' has not been found"))
        })?;
        self.load = Some(Load {
            source: source.into(),
            exit_on_error,
        });
        Ok(json!({}))
    }

    fn migration_event(&mut self, status: &str, events: &mut Vec<Value>) {
        self.migration = json!({"status": status});
        if self.capabilities.get("events") == Some(&true) {
            events.push(event("MIGRATION", Some(json!({"status": status}))));
        }
    }

    /// Loads; a failed load ends the process with status 1, as in QEMU, unless told otherwise.
    fn finish_load(&mut self, mut load: Load, events: &mut Vec<Value>) {
        self.migration_event("setup", events);
        self.migration_event("active", events);
        let result = match self.options.fail {
            Some(Failure::Load) => Err("as asked for by -fail".to_owned()),
            Some(Failure::Crash) => process::abort(),
            _ => state::load(&self.machine, &self.options.machine, &mut load.source),
        };
        if let Err(error) = result {
            eprintln!("ferry-synthetic: {error}");
            if load.exit_on_error {
                process::exit(1);
            }
            self.migration_event("failed", events);
            self.migration["error-desc"] = json!(error);
            return;
        }
        self.migration_event("completed", events);
        self.state = RunState::Paused;
        if self.autostart {
            self.resume(events);
        }
    }

    fn check(&self, arguments: &mut Arguments) -> Result<Value, QmpError> {
        let sweep = arguments.flag("sweep")?.unwrap_or(false);
        let swept = sweep.then(|| self.machine.sweep());
        let sums = self.machine.check();
        let mut answer =
            json!({"writes": sums.writes, "checked": sums.checked, "corrupt": sums.corrupt});
        if let Some((pages, differing)) = swept {
            answer["swept"] = json!(pages);
            answer["differing"] = json!(differing);
        }
        Ok(answer)
    }
}

impl Commands for Control {
    fn run(&mut self, command: &mut Command, events: &mut Vec<Value>) -> Outcome {
        if command.name == "quit" && command.arguments.is_empty() {
            let data = json!({"guest": false, "reason": "host-qmp-quit"});
            events.push(event("SHUTDOWN", Some(data)));
            return Outcome::Quit;
        }
        Outcome::Reply(self.dispatch(command, events))
    }

    fn after(&mut self, events: &mut Vec<Value>) {
        if let Some(load) = self.load.take() {
            self.finish_load(load, events);
        }
    }
}

/// The object tree, as far as it goes: a machine without devices.
fn qom_list(path: &str) -> Result<Value, QmpError> {
    let names: &[(&str, &str)] = match path {
        "/" => &[
            ("machine", "child<synthetic-machine>"),
            ("objects", "child<container>"),
        ],
        "/machine" => &[
            ("type", "string"),
            ("peripheral", "child<container>"),
            ("peripheral-anon", "child<container>"),
        ],
        "/objects" | "/chardevs" | "/machine/peripheral" | "/machine/peripheral-anon" => {
            &[("type", "string")]
        }
        _ => return Err(no_device(path)),
    };
    Ok(names
        .iter()
        .map(|(name, kind)| json!({"name": name, "type": kind}))
        .collect())
}
