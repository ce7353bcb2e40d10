//! The program of every pod's sandbox: it holds the namespaces until it is terminated. One static
//! program, alone in its image.

unsafe extern "C" {
    fn pause() -> i32;
    fn signal(number: i32, handler: usize) -> usize;
}

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
const SIGCHLD: i32 = 17;
const SIG_IGN: usize = 1;

extern "C" fn end(_signal: i32) {
    std::process::exit(0);
}

fn main() {
    // SAFETY: all three take plain numbers, and a handler that lives as long as the program. As
    // process 1 it gets only signals that it handles; ignoring SIGCHLD makes the kernel bury the
    // orphans that pods with one process namespace leave to it.
    unsafe {
        let _ = signal(SIGCHLD, SIG_IGN);
        let _ = signal(SIGINT, end as *const () as usize);
        let _ = signal(SIGTERM, end as *const () as usize);
        loop {
            let _ = pause();
        }
    }
}
