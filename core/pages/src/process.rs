//! What /proc says about a process: its mappings, its descriptors.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::{PAGE_SIZE, PagesError};

/// A line of /proc/PID/maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub start: u64,
    pub end: u64,
    pub executable: bool,
    /// Offset of `start` in the file.
    pub offset: u64,
    /// 0 where there is no file.
    pub inode: u64,
    /// Path or label, such as `[vdso]`.
    pub name: String,
}

/// All mappings of a process in ascending order.
pub(crate) fn mappings(pid: i32) -> Result<Vec<Mapping>, PagesError> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).map_err(|error| unreadable(pid, &path, &error))?;
    Ok(text.lines().filter_map(parse_mapping).collect())
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = fields.next()?;
    let inode = fields.nth(1)?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        executable: permissions.contains('x'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        inode: inode.parse().ok()?,
        name: fields.next().unwrap_or_default().to_owned(),
    })
}

/// Calls `found` for each run of addresses in `[start, end)` for which the mapped file holds data.
///
/// The file is opened through /proc/PID/map_files, so it may be unlinked and its descriptor
/// closed. What reclaim took out of the page table is found here all the same.
pub(crate) fn file_data(
    pid: i32,
    mapping: &Mapping,
    start: u64,
    end: u64,
    mut found: impl FnMut(u64, u64),
) -> Result<(), PagesError> {
    let path = format!(
        "/proc/{pid}/map_files/{:x}-{:x}",
        mapping.start, mapping.end
    );
    let file = open(pid, &path)?;
    let (start, end) = (start.max(mapping.start), end.min(mapping.end));
    let offset_of = |address: u64| address - mapping.start + mapping.offset;
    let stop = offset_of(end.max(start));
    let seek = |from| match rustix::fs::seek(&file, from) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(PagesError::kernel(format!("seeking in {path}"), errno)),
    };
    let page = PAGE_SIZE as u64;
    let mut at = offset_of(start);
    while at < stop {
        let Some(data) = seek(SeekFrom::Data(at))?.filter(|data| *data < stop) else {
            break;
        };
        let hole = seek(SeekFrom::Hole(data))?.unwrap_or(stop);
        let (from, to) = (data / page * page, hole.next_multiple_of(page).min(stop));
        found(
            mapping.start + from - mapping.offset,
            mapping.start + to - mapping.offset,
        );
        at = hole.max(data + 1);
    }
    Ok(())
}

/// Numbers of the userfaultfds open in a process, ascending.
///
/// # Errors
/// `Gone`, `Kernel`.
pub fn find_userfaultfd(pid: i32) -> Result<Vec<i32>, PagesError> {
    let path = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&path).map_err(|error| unreadable(pid, &path, &error))?;
    let mut found: Vec<i32> = entries
        .flatten()
        .filter(|entry| {
            fs::read_link(entry.path())
                .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Whether a seccomp filter watches the process's system calls.
pub(crate) fn has_seccomp_filter(pid: i32) -> Result<bool, PagesError> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).map_err(|error| unreadable(pid, &path, &error))?;
    let mode = text.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    Ok(mode.is_some_and(|mode| mode.trim() == "2"))
}

/// Whether a process is no more than an exit status, or not even that.
pub(crate) fn has_ended(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |text| {
        let state = text
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        matches!(state, Some('Z' | 'X'))
    })
}

pub(crate) fn open(pid: i32, path: &str) -> Result<OwnedFd, PagesError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| unreadable(pid, path, &errno.into()))
}

fn unreadable(pid: i32, path: &str, error: &io::Error) -> PagesError {
    let errno = error
        .raw_os_error()
        .map_or(Errno::IO, Errno::from_raw_os_error);
    let process = fs::symlink_metadata(format!("/proc/{pid}"));
    if errno == Errno::SRCH || process.is_err() {
        return PagesError::Gone { pid };
    }
    PagesError::kernel(format!("opening {path}"), errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps_is_understood() {
        let line = "7f00a0000000-7f00a0200000 rw-s 00001000 00:01 1042  /memfd:a b (deleted)";
        let mapping = parse_mapping(line).unwrap();
        assert_eq!(
            (mapping.start, mapping.end),
            (0x7f00_a000_0000, 0x7f00_a020_0000)
        );
        assert_eq!((mapping.offset, mapping.inode), (0x1000, 1042));
        assert!(!mapping.executable);
        let line = "7ffd1-7ffd2 r-xp 00000000 00:00 0 [vdso]";
        let mapping = parse_mapping(line).unwrap();
        assert!(mapping.executable);
        assert_eq!((mapping.inode, mapping.name.as_str()), (0, "[vdso]"));
        assert_eq!(parse_mapping("nonsense"), None);
    }
}
