//! Threads that are reused: to start one costs tens of microseconds, most of the price of a short
//! connection.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use log::error;
use parking_lot::Mutex;

/// A parked thread ends after this long: long enough to serve one burst after another, short
/// enough that a quiet program is a small one.
const PARK_TIMEOUT: Duration = Duration::from_secs(5);

/// Enough for a name look-up in the C library, the deepest that a job goes. Only touched pages
/// cost memory.
const STACK_SIZE: usize = 256 * 1024;

struct Job {
    name: &'static str,
    work: Box<dyn FnOnce() + Send>,
}

/// A stack of parked threads, each with a channel of its own. The one that parked last is woken
/// first: its stack and its core's caches are warm, and the others get to time out.
pub struct Workers {
    parked: Arc<Mutex<Parked>>,
}

struct Parked {
    /// None instead of a job ends the thread.
    threads: Vec<Sender<Option<Job>>>,
    open: bool,
}

impl Workers {
    /// No thread yet.
    pub fn new() -> Self {
        Self {
            parked: Arc::new(Mutex::new(Parked {
                threads: Vec::new(),
                open: true,
            })),
        }
    }

    /// Runs the job on a parked thread, or on a new one. If the system refuses one, the job is
    /// dropped, and with it the sockets that it holds. A panic ends the job and not the thread.
    pub fn start(
        &self,
        name: &'static str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let job = Job {
            name,
            work: Box::new(work),
        };
        let parked = self.parked.lock().threads.pop();
        if let Some(thread) = parked {
            // The slot is free, as only parked threads are on the stack, each once.
            let _ = thread.send(Some(job));
            return Ok(());
        }
        let parked = self.parked.clone();
        thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || work_and_park(job, &parked))?;
        Ok(())
    }
}

impl Drop for Workers {
    /// Parked threads end now, busy ones after their job.
    fn drop(&mut self) {
        let mut parked = self.parked.lock();
        parked.open = false;
        for thread in parked.threads.drain(..) {
            let _ = thread.send(None);
        }
    }
}

fn work_and_park(first: Job, parked: &Mutex<Parked>) {
    let (sender, jobs) = bounded(1);
    let mut job = Some(first);
    while let Some(Job { name, work }) = job {
        set_name(name);
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            error!("a {name} thread panicked; what it held was closed, everything else goes on");
        }
        job = park(&sender, &jobs, parked);
    }
}

/// Waits for the next job; None if none came in time.
fn park(
    sender: &Sender<Option<Job>>,
    jobs: &Receiver<Option<Job>>,
    parked: &Mutex<Parked>,
) -> Option<Job> {
    set_name("parked");
    {
        let mut parked = parked.lock();
        if !parked.open {
            return None;
        }
        parked.threads.push(sender.clone());
    }
    if let Ok(job) = jobs.recv_timeout(PARK_TIMEOUT) {
        return job;
    }
    {
        let threads = &mut parked.lock().threads;
        if let Some(place) = threads.iter().position(|it| it.same_channel(sender)) {
            threads.remove(place);
            return None;
        }
    }
    // Popped in this very moment: a job, or the end, is on its way.
    jobs.recv().ok().flatten()
}

/// Names this thread after its job, for whoever looks at a stack dump or at `top -H`.
pub fn set_name(name: &str) {
    #[cfg(target_os = "linux")]
    if let Ok(name) = std::ffi::CString::new(name) {
        let _ = rustix::thread::set_name(&name);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = name;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::ThreadId;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn run(workers: &Workers) -> ThreadId {
        let (done, result) = bounded(1);
        workers
            .start("test", move || {
                let _ = done.send(thread::current().id());
            })
            .unwrap();
        result.recv_timeout(DEADLINE).unwrap()
    }

    fn wait_for_parked(workers: &Workers, count: usize) {
        let start = std::time::Instant::now();
        while workers.parked.lock().threads.len() != count {
            assert!(start.elapsed() < DEADLINE, "never {count} parked threads");
            thread::yield_now();
        }
    }

    #[test]
    fn the_thread_that_parked_last_is_woken_first() {
        let workers = Workers::new();
        let (first_may_end, first_waits) = bounded::<()>(0);
        workers
            .start("test", move || {
                let _ = first_waits.recv();
            })
            .unwrap();
        let second = run(&workers);
        wait_for_parked(&workers, 1);
        assert_eq!(run(&workers), second);
        wait_for_parked(&workers, 1);
        drop(first_may_end);
        wait_for_parked(&workers, 2);
        let last = run(&workers);
        assert_ne!(last, second);
        wait_for_parked(&workers, 2);
        assert_eq!(run(&workers), last);
    }

    #[test]
    fn parked_threads_end_with_their_workers() {
        let workers = Workers::new();
        run(&workers);
        wait_for_parked(&workers, 1);
        let parked = Arc::downgrade(&workers.parked);
        drop(workers);
        let start = std::time::Instant::now();
        while parked.strong_count() > 0 {
            assert!(start.elapsed() < PARK_TIMEOUT / 2, "the thread lives on");
            thread::yield_now();
        }
    }

    #[test]
    fn a_job_that_panics_leaves_its_thread() {
        let workers = Workers::new();
        let thread = run(&workers);
        wait_for_parked(&workers, 1);
        workers.start("test", || panic!("on purpose")).unwrap();
        wait_for_parked(&workers, 1);
        assert_eq!(run(&workers), thread);
    }
}
