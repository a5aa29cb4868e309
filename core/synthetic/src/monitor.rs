//! QMP on unix sockets: framing, descriptors that come along, replies and events.
//!
//! One thread serves all monitors and runs all commands, as QEMU's main thread does: a command
//! that waits for a missing page keeps every monitor waiting.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Map, Value, json};

/// A command longer than this ends the connection.
const COMMAND_MAX: usize = 1 << 20;
/// Descriptors taken from one message.
const DESCRIPTORS_MAX: usize = 16;
/// A client that reads nothing for this long is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// An error in QMP's form.
#[derive(Debug)]
pub struct QmpError {
    pub class: &'static str,
    pub description: String,
}

impl QmpError {
    /// The class of nearly all of them.
    pub fn generic(description: impl Into<String>) -> Self {
        Self {
            class: "GenericError",
            description: description.into(),
        }
    }
}

/// A command that came in.
pub struct Command {
    pub name: String,
    pub arguments: Map<String, Value>,
    pub id: Option<Value>,
    /// Descriptors that came with it or before it and were not used yet.
    pub descriptors: VecDeque<OwnedFd>,
}

/// A connected client.
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    negotiated: bool,
    closed: bool,
}

/// A listening socket with the one client that it serves at a time.
struct Monitor {
    path: PathBuf,
    listener: UnixListener,
    client: Option<Client>,
}

/// All monitors of a process.
pub struct Monitors {
    monitors: Vec<Monitor>,
    greeting: Value,
}

/// What became of a command.
pub enum Outcome {
    Reply(Result<Value, QmpError>),
    /// Reply, then leave.
    Quit,
}

/// Runs commands; events go to all monitors before the reply does.
pub trait Commands {
    /// Runs one, with a place for events to be sent.
    fn run(&mut self, command: &mut Command, events: &mut Vec<Value>) -> Outcome;

    /// What a command began and left to be done after its reply.
    fn after(&mut self, events: &mut Vec<Value>);
}

impl Monitors {
    /// Listens at every path; a stale socket there is replaced, as QEMU does.
    pub fn listen(paths: &[PathBuf], version: Value) -> Result<Self, String> {
        let bind = |path: &PathBuf| {
            let _ = fs::remove_file(path);
            let listener = UnixListener::bind(path)
                .map_err(|error| format!("Failed to bind socket to {}: {error}", path.display()))?;
            Ok(Monitor {
                path: path.clone(),
                listener,
                client: None,
            })
        };
        let monitors = paths.iter().map(bind).collect::<Result<_, String>>()?;
        let greeting = json!({"QMP": {"version": version, "capabilities": ["oob"]}});
        Ok(Self { monitors, greeting })
    }

    /// Serves until a command says to leave.
    pub fn serve(&mut self, commands: &mut impl Commands) -> io::Result<()> {
        loop {
            self.wait()?;
            for index in 0..self.monitors.len() {
                while let Some(request) = self.monitors[index].next_request() {
                    let quit = self.answer(index, request, commands);
                    if quit {
                        self.remove_sockets();
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The sockets' paths go when the process leaves in good order.
    pub fn remove_sockets(&self) {
        for monitor in &self.monitors {
            let _ = fs::remove_file(&monitor.path);
        }
    }

    /// Waits for something to arrive and takes it.
    fn wait(&mut self) -> io::Result<()> {
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        for monitor in &self.monitors {
            match &monitor.client {
                Some(client) => fds.push(PollFd::new(&client.stream, PollFlags::IN)),
                None => fds.push(PollFd::new(&monitor.listener, PollFlags::IN)),
            }
        }
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            other => other?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (monitor, ready) in self.monitors.iter_mut().zip(ready) {
            if ready {
                monitor.take(&self.greeting);
            }
        }
        Ok(())
    }

    /// Runs a request and sends what comes of it; says whether to leave.
    fn answer(
        &mut self,
        index: usize,
        request: Result<Command, QmpError>,
        commands: &mut impl Commands,
    ) -> bool {
        let mut events = Vec::new();
        let mut id = None;
        let (result, quit) = match request {
            Err(error) => (Err(error), false),
            Ok(mut command) => {
                id = command.id.take();
                let client = self.monitors[index].client.as_mut();
                let outcome = match client.filter(|c| !c.negotiated) {
                    Some(client) => Outcome::Reply(negotiate(client, &command)),
                    None => commands.run(&mut command, &mut events),
                };
                if let Some(client) = self.monitors[index].client.as_mut() {
                    client.descriptors.extend(command.descriptors);
                }
                match outcome {
                    Outcome::Reply(result) => (result, false),
                    Outcome::Quit => (Ok(json!({})), true),
                }
            }
        };
        self.broadcast(&events);
        let mut reply = Map::new();
        match result {
            Ok(value) => reply.insert("return".to_owned(), value),
            Err(QmpError { class, description }) => reply.insert(
                "error".to_owned(),
                json!({"class": class, "desc": description}),
            ),
        };
        if let Some(id) = id {
            reply.insert("id".to_owned(), id);
        }
        let monitor = &mut self.monitors[index];
        if let Some(client) = monitor.client.as_mut() {
            client.send(&Value::Object(reply));
        }
        events.clear();
        commands.after(&mut events);
        self.broadcast(&events);
        quit
    }

    fn broadcast(&mut self, events: &[Value]) {
        let clients = self
            .monitors
            .iter_mut()
            .filter_map(|monitor| monitor.client.as_mut());
        for client in clients.filter(|client| client.negotiated) {
            for event in events {
                client.send(event);
            }
        }
    }
}

fn negotiate(client: &mut Client, command: &Command) -> Result<Value, QmpError> {
    if command.name != "qmp_capabilities" {
        return Err(QmpError {
            class: "CommandNotFound",
            description: "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned(),
        });
    }
    client.negotiated = true;
    Ok(json!({}))
}

impl Monitor {
    /// Accepts a client, or reads from the one there is.
    fn take(&mut self, greeting: &Value) {
        match &mut self.client {
            Some(client) => client.receive(),
            None => {
                let Ok((stream, _)) = self.listener.accept() else {
                    return;
                };
                let _ = stream.set_write_timeout(Some(WRITE_TIMEOUT));
                let mut client = Client {
                    stream,
                    input: Vec::new(),
                    descriptors: VecDeque::new(),
                    negotiated: false,
                    closed: false,
                };
                client.send(greeting);
                self.client = Some(client);
            }
        }
    }

    fn next_request(&mut self) -> Option<Result<Command, QmpError>> {
        let client = self.client.as_mut()?;
        let request = client.next_request();
        if request.is_none() && client.closed {
            self.client = None;
        }
        request
    }
}

impl Client {
    /// A client that cannot be written to is dropped when its input is at an end.
    fn send(&mut self, message: &Value) {
        let mut line = message.to_string();
        line.push_str("\r\n");
        if self.stream.write_all(line.as_bytes()).is_err() {
            self.closed = true;
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0; 1 << 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut pieces = [IoSliceMut::new(&mut buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let length = match recvmsg(self.stream.as_fd(), &mut pieces, &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => return,
            Err(_) => 0,
            Ok(message) => message.bytes,
        };
        let came: VecDeque<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        // QEMU, too, keeps the descriptors of the last message that had any.
        if !came.is_empty() {
            self.descriptors = came;
        }
        self.input.extend(&buffer[..length]);
        self.closed |= length == 0;
        if self.input.len() > COMMAND_MAX {
            self.input.clear();
            self.closed = true;
        }
    }

    /// The next whole JSON value in the input.
    fn next_request(&mut self) -> Option<Result<Command, QmpError>> {
        let mut values = serde_json::Deserializer::from_slice(&self.input).into_iter::<Value>();
        match values.next()? {
            Ok(value) => {
                let end = values.byte_offset();
                self.input.drain(..end);
                Some(command(value, std::mem::take(&mut self.descriptors)))
            }
            Err(error) if error.is_eof() => None,
            Err(error) => {
                // Start again at the next line: nothing tells where the next value begins.
                let end = self.input.iter().position(|&b| b == b'\n');
                self.input
                    .drain(..end.map_or(self.input.len(), |at| at + 1));
                Some(Err(QmpError::generic(format!("JSON parse error, {error}"))))
            }
        }
    }
}

/// Takes a command apart, with QEMU's words for what is wrong.
fn command(value: Value, descriptors: VecDeque<OwnedFd>) -> Result<Command, QmpError> {
    let Value::Object(members) = value else {
        return Err(QmpError::generic("QMP input must be a JSON object"));
    };
    let mut command = Command {
        name: String::new(),
        arguments: Map::new(),
        id: None,
        descriptors,
    };
    for (name, value) in members {
        match (name.as_str(), value) {
            ("execute" | "exec-oob", Value::String(execute)) => command.name = execute,
            ("execute" | "exec-oob", _) => {
                let text = format!("QMP input member '{name}' must be a string");
                return Err(QmpError::generic(text));
            }
            ("arguments", Value::Object(arguments)) => command.arguments = arguments,
            ("arguments", _) => {
                return Err(QmpError::generic(
                    "QMP input member 'arguments' must be an object",
                ));
            }
            ("id", id) => command.id = Some(id),
            _ => {
                let text = format!("QMP input member '{name}' is unexpected");
                return Err(QmpError::generic(text));
            }
        }
    }
    if command.name.is_empty() {
        return Err(QmpError::generic("QMP input lacks member 'execute'"));
    }
    Ok(command)
}

/// An event with the time of now.
pub fn event(name: &str, data: Option<Value>) -> Value {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut event = json!({
        "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
        "event": name,
    });
    if let Some(data) = data {
        event["data"] = data;
    }
    event
}
