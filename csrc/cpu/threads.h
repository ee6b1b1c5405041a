// Runs one function on several threads, on torch's own workers where there are any.
#pragma once

namespace twofour::cpu {

// Calls body(context) on the calling thread and on up to `threads` - 1 others, and returns when all have returned.
// Fewer calls than asked for are possible (nested regions, a busy pool): the body must share its work out through an
// atomic counter, not through the number of calls. Safe to call from several threads at once.
void run_on_threads(int threads, void (*body)(void* context), void* context);

// "libgomp": the OpenMP runtime that torch loaded into the process; "pool": own threads.
const char* threads_source();

}  // namespace twofour::cpu
