//! What the process takes of its host, as far as the system tells. Nothing is told outside of Linux.

use std::time::Duration;

/// What the process takes of its host now, and the processor time since its start.
#[derive(Debug, Default)]
pub struct Process {
    /// The open descriptors.
    pub descriptors: Option<u64>,
    /// The most descriptors that may be open.
    pub descriptor_limit: Option<u64>,
    pub threads: Option<u64>,
    /// The processor time of all threads, in the program and in the kernel.
    pub cpu: Option<Duration>,
    /// The bytes of memory that are resident.
    pub memory: Option<u64>,
}

impl Process {
    /// Asks the system.
    #[cfg(target_os = "linux")]
    pub fn read() -> Self {
        use rustix::process::{Resource, getrlimit};
        use rustix::time::{ClockId, clock_gettime};
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        // The count has one more: what the directory itself is read with.
        let open = std::fs::read_dir("/proc/self/fd").map(Iterator::count);
        Self {
            descriptors: open.ok().map(|count| count.saturating_sub(1) as u64),
            descriptor_limit: getrlimit(Resource::Nofile).current,
            threads: number(&status, "Threads:"),
            cpu: Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).ok(),
            memory: number(&status, "VmRSS:").map(|kib| kib * 1024),
        }
    }

    /// Tells nothing.
    #[cfg(not(target_os = "linux"))]
    pub fn read() -> Self {
        Self::default()
    }
}

/// Returns the number behind a name that begins a line.
#[cfg(target_os = "linux")]
fn number(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.split_whitespace().next()?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_system_tells_about_this_process() {
        let process = Process::read();
        let (few, many) = (1_u64, 1 << 40);
        for (what, value) in [
            ("descriptors", process.descriptors),
            ("descriptor_limit", process.descriptor_limit),
            ("threads", process.threads),
            ("memory", process.memory),
        ] {
            assert!(
                value.is_some_and(|it| (few..many).contains(&it)),
                "{what}: {value:?}"
            );
        }
        assert!(process.memory > Some(500_000), "{process:?}");
        assert!(process.cpu > Some(Duration::ZERO), "{process:?}");
    }

    #[test]
    fn numbers_stand_behind_their_names() {
        let status = "Name:\ttpserver\nVmRSS:\t    5320 kB\nThreads:\t7\n";
        assert_eq!(number(status, "VmRSS:"), Some(5320));
        assert_eq!(number(status, "Threads:"), Some(7));
        assert_eq!(number(status, "Name:"), None);
        assert_eq!(number(status, "Pid:"), None);
    }
}
