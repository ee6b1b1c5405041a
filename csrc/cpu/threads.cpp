#include "cpu/threads.h"

#include <dlfcn.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace twofour::cpu {
namespace {

using Body = void (*)(void*);
using GompParallel = void (*)(Body body, void* context, unsigned threads, unsigned flags);

// libgomp is not linked: a second copy would fight the spinning workers of torch's. RTLD_NOLOAD finds the copy that
// torch loaded (its SONAME is not hashed) and nothing before `import torch`; hence the search is repeated until it
// succeeds.
GompParallel find_libgomp() {
  static GompParallel found = nullptr;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (found == nullptr) {
    if (void* library = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_LAZY)) {
      found = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
    }
  }
  return found;
}

// Persistent workers, one job at a time. A second caller finds the pool busy and works alone.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: workers may outlive static destructors
    return *pool;
  }

  void run(int threads, Body body, void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner || getpid() != process_) {  // a forked child has no workers
      body(context);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) workers_.emplace_back([this] { work(); });
      body_ = body;
      context_ = context;
      waiting_ = threads - 1;
    }
    wake_.notify_all();
    body(context);
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_ = 0;  // the caller has drained the work: nobody else needs to start
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return waiting_ > 0; });
      --waiting_;
      const Body body = body_;
      void* const context = context_;
      ++active_;
      lock.unlock();
      body(context);
      lock.lock();
      --active_;
      if (active_ == 0) done_.notify_one();
    }
  }

  const pid_t process_ = getpid();
  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  int waiting_ = 0;  // workers that the current job still wants
  int active_ = 0;   // workers inside the current job
};

}  // namespace

void run_on_threads(int threads, Body body, void* context) {
  if (threads <= 1) {
    body(context);
  } else if (const GompParallel parallel = find_libgomp()) {
    parallel(body, context, static_cast<unsigned>(threads), 0);
  } else {
    Pool::instance().run(threads, body, context);
  }
}

const char* threads_source() { return find_libgomp() != nullptr ? "libgomp" : "pool"; }

}  // namespace twofour::cpu
