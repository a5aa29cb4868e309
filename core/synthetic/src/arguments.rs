//! Which commands there are, what they may be told, and QEMU's words for what is wrong.

use serde_json::{Map, Value};

use crate::monitor::QmpError;

/// All commands and the arguments that each knows; `*` is any.
pub const COMMANDS: &[(&str, &[&str])] = &[
    ("add-fd", &["fdset-id", "opaque"]),
    ("blockdev-add", &["*"]),
    ("blockdev-del", &["node-name"]),
    ("closefd", &["fdname"]),
    ("cont", &[]),
    ("getfd", &["fdname"]),
    ("human-monitor-command", &["command-line", "cpu-index"]),
    ("migrate-incoming", &["uri", "exit-on-error"]),
    ("migrate-set-capabilities", &["capabilities"]),
    ("migrate-set-parameters", &["*"]),
    ("qmp_capabilities", &["enable"]),
    ("qom-get", &["path", "property"]),
    ("qom-list", &["path"]),
    ("query-balloon", &[]),
    ("query-block", &[]),
    ("query-chardev", &[]),
    ("query-commands", &[]),
    ("query-cpus-fast", &[]),
    ("query-fdsets", &[]),
    ("query-hotpluggable-cpus", &[]),
    ("query-iothreads", &[]),
    ("query-kvm", &[]),
    ("query-migrate", &[]),
    ("query-migrate-capabilities", &[]),
    ("query-name", &[]),
    ("query-named-block-nodes", &["flat"]),
    ("query-pci", &[]),
    ("query-rx-filter", &["name"]),
    ("query-status", &[]),
    ("query-uuid", &[]),
    ("query-version", &[]),
    ("quit", &[]),
    ("remove-fd", &["fdset-id", "fd"]),
    ("stop", &[]),
    ("x-query-ramblock", &[]),
    ("x-synthetic-check", &["sweep"]),
    ("xen-save-devices-state", &["filename", "live"]),
];

pub fn missing(name: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{name}' is missing"))
}

pub fn no_descriptor() -> QmpError {
    QmpError::generic("No file descriptor supplied via SCM_RIGHTS")
}

pub fn no_such_descriptor(name: &str) -> QmpError {
    QmpError::generic(format!("File descriptor named '{name}' not found"))
}

pub fn no_device(path: &str) -> QmpError {
    QmpError {
        class: "DeviceNotFound",
        description: format!("Device '{path}' not found"),
    }
}

pub fn not_found(name: &str) -> QmpError {
    let description = format!("The command {name} has not been found");
    QmpError {
        class: "CommandNotFound",
        description,
    }
}

/// A command's arguments.
pub struct Arguments(Map<String, Value>);

impl Arguments {
    /// Refuses a command that does not exist and arguments that it does not know, before any
    /// effect.
    pub fn known(command: &str, arguments: Map<String, Value>) -> Result<Self, QmpError> {
        let entry = COMMANDS.iter().find(|(name, _)| *name == command);
        let (_, known) = entry.ok_or_else(|| not_found(command))?;
        let foreign = |name: &&String| !known.contains(&name.as_str()) && *known != ["*"];
        match arguments.keys().find(foreign) {
            Some(name) => Err(QmpError::generic(format!(
                "Parameter '{name}' is unexpected"
            ))),
            None => Ok(Self(arguments)),
        }
    }

    pub fn optional(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    fn wrong(name: &str, expected: &str) -> QmpError {
        let text = format!("Invalid parameter type for '{name}', expected: {expected}");
        QmpError::generic(text)
    }

    pub fn text(&mut self, name: &str) -> Result<String, QmpError> {
        match self.optional(name) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(Self::wrong(name, "string")),
            None => Err(missing(name)),
        }
    }

    pub fn list(&mut self, name: &str) -> Result<Vec<Value>, QmpError> {
        match self.optional(name) {
            Some(Value::Array(items)) => Ok(items),
            Some(_) => Err(Self::wrong(name, "array")),
            None => Err(missing(name)),
        }
    }

    pub fn number(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        let value = self.optional(name);
        value
            .map(|v| v.as_u64().ok_or_else(|| Self::wrong(name, "integer")))
            .transpose()
    }

    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        let value = self.optional(name);
        value
            .map(|v| v.as_bool().ok_or_else(|| Self::wrong(name, "boolean")))
            .transpose()
    }
}
