//! Threads that are reused: to start one costs tens of microseconds, most of the price of a short
//! connection.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// A parked thread ends after this long: long enough to serve one burst after another, short
/// enough that a quiet program is a small one.
const PARK_TIMEOUT: Duration = Duration::from_secs(5);

/// A thread that has been parked for this long is named so. Most get their next job sooner, and often
/// one of the same name: to name a thread is a system call.
const PARKED: Duration = Duration::from_millis(100);

/// Enough for a name look-up in the C library, the deepest that a job goes. Only touched pages
/// cost memory.
const STACK_SIZE: usize = 256 * 1024;

struct Job {
    name: &'static str,
    work: Box<dyn FnOnce() + Send>,
}

/// A stack of parked threads. The one that parked last is woken first: its stack and its core's
/// caches are warm, and the others get to time out.
pub struct Workers(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    all_done: Condvar,
    /// Told of each job that has panicked.
    panicked: fn(&str),
}

struct State {
    parked: Vec<Arc<Place>>,
    busy: usize,
    open: bool,
}

/// Where a parked thread waits. A channel would do the same, but with one for each thread a held
/// pair takes 5 KiB more.
struct Place {
    next: Mutex<Option<Next>>,
    woken: Condvar,
}

/// What a parked thread is woken for.
enum Next {
    Job(Job),
    End,
}

impl Workers {
    /// No thread yet. `panicked` is told of each job that has.
    pub fn new(panicked: fn(&str)) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                parked: Vec::new(),
                busy: 0,
                open: true,
            }),
            all_done: Condvar::new(),
            panicked,
        }))
    }

    /// Runs the job on a parked thread, or on a new one. If the system refuses one, the job is
    /// dropped, and with it the sockets that it holds. A panic ends the job and not the thread.
    pub fn start(
        &self,
        name: &'static str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let work = Box::new(work);
        let job = Job { name, work };
        let mut state = self.0.state.lock();
        state.busy += 1;
        let parked = state.parked.pop();
        drop(state);
        if let Some(place) = parked {
            place.wake(Next::Job(job));
            return Ok(());
        }
        let shared = self.0.clone();
        let spawned = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || shared.work_and_park(job));
        if spawned.is_err() {
            self.0.done(&mut self.0.state.lock());
        }
        spawned.map(drop)
    }

    /// Waits until every job is done, but not longer than that.
    pub fn wait(&self, limit: Duration) {
        let mut state = self.0.state.lock();
        let busy = |state: &mut State| state.busy > 0;
        self.0.all_done.wait_while_for(&mut state, busy, limit);
    }
}

impl Drop for Workers {
    /// Parked threads end now, busy ones after their job.
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.open = false;
        for place in state.parked.drain(..) {
            place.wake(Next::End);
        }
    }
}

impl Shared {
    fn work_and_park(&self, first: Job) {
        let place = Arc::new(Place {
            next: Mutex::new(None),
            woken: Condvar::new(),
        });
        let mut next = Next::Job(first);
        while let Next::Job(Job { name, work }) = next {
            set_name(name);
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                (self.panicked)(name);
            }
            next = self.park(&place);
        }
    }

    /// Waits for the next job, or the end, which comes by itself after a while.
    fn park(&self, place: &Arc<Place>) -> Next {
        let mut state = self.state.lock();
        self.done(&mut state);
        if !state.open {
            return Next::End;
        }
        state.parked.push(place.clone());
        drop(state);
        if let Some(next) = place.wait(PARKED) {
            return next;
        }
        set_name("parked");
        if let Some(next) = place.wait(PARK_TIMEOUT) {
            return next;
        }
        let mut state = self.state.lock();
        if let Some(index) = state.parked.iter().position(|it| Arc::ptr_eq(it, place)) {
            state.parked.remove(index);
            return Next::End;
        }
        drop(state);
        // Taken off the stack in this very moment, to be woken.
        loop {
            if let Some(next) = place.wait(PARK_TIMEOUT) {
                return next;
            }
        }
    }

    fn done(&self, state: &mut State) {
        state.busy -= 1;
        if state.busy == 0 {
            self.all_done.notify_all();
        }
    }
}

impl Place {
    fn wake(&self, next: Next) {
        *self.next.lock() = Some(next);
        self.woken.notify_one();
    }

    fn wait(&self, limit: Duration) -> Option<Next> {
        let mut next = self.next.lock();
        let none = |next: &mut Option<Next>| next.is_none();
        self.woken.wait_while_for(&mut next, none, limit);
        next.take()
    }
}

thread_local! {
    /// What [`set_name`] has called this thread last.
    static NAME: Cell<&'static str> = const { Cell::new("") };
}

/// Names this thread after its job, for whoever looks at a stack dump or at `top -H`.
pub fn set_name(name: &'static str) {
    if NAME.replace(name) == name {
        return;
    }
    #[cfg(target_os = "linux")]
    if let Ok(name) = std::ffi::CString::new(name) {
        let _ = rustix::thread::set_name(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
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
        while workers.0.state.lock().parked.len() != count {
            assert!(start.elapsed() < DEADLINE, "never {count} parked threads");
            thread::yield_now();
        }
    }

    #[test]
    fn the_thread_that_parked_last_is_woken_first() {
        let workers = Workers::new(|_| ());
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
        let workers = Workers::new(|_| ());
        run(&workers);
        wait_for_parked(&workers, 1);
        let parked = Arc::downgrade(&workers.0);
        drop(workers);
        let start = std::time::Instant::now();
        while parked.strong_count() > 0 {
            assert!(start.elapsed() < PARK_TIMEOUT / 2, "the thread lives on");
            thread::yield_now();
        }
    }

    #[test]
    fn a_job_that_panics_leaves_its_thread() {
        let workers = Workers::new(|_| ());
        let thread = run(&workers);
        wait_for_parked(&workers, 1);
        workers.start("test", || panic!("on purpose")).unwrap();
        wait_for_parked(&workers, 1);
        assert_eq!(run(&workers), thread);
    }
}
