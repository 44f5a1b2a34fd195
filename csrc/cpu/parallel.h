// One parallel region at a time, on the threads that torch already has.
#pragma once

namespace nexus::cpu {

// Calls work(context, i) on up to `threads` threads at once, this one among them, and returns when all have
// returned. `i` is the thread's number, mostly the same one in every region; fewer threads than asked for may
// come, so that `work` must claim its share from `context`.
void run_parallel(int threads, void (*work)(void*, int), void* context);

// The name of what run_parallel uses: the OpenMP runtime's file, or "std::thread".
const char* thread_runtime();

}  // namespace nexus::cpu
