// Running a plan on whatever threads turn up.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "plan.h"

namespace upg {

// Threads that call `work` claim items until none is left. A thread waits only for items that another thread has
// claimed and is running, never for a thread to start; so a pool whose threads are all busy delays nothing and cannot
// deadlock, and one thread alone does everything. A thread that comes too late touches no buffer.
//
// Each thread begins with a share of consecutive items, then helps with the other shares: long runs of memory for one
// thread suit prefetching, where in turns each would have prefetched for the other.
class Execution {
 public:
  // `threads` is how many will call `work`, if they ever come.
  Execution(std::unique_ptr<Plan> plan, size_t threads)
      : plan_(std::move(plan)), threads_(threads), phases_(plan_->items().size()) {
    for (Phase& phase : phases_) phase.shares = std::vector<Share>(threads);
  }

  // Returns when all items are done, whoever did them. Want of memory for one, on whatever thread, is thrown here.
  void work() {
    help();
    if (failed_.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }

  // The same for other threads, which have nobody to throw to. What is left to do after a failure counts as done, so that
  // nobody waits for it.
  void help() noexcept {
    const size_t me = joined_.fetch_add(1, std::memory_order_relaxed);
    for (size_t p = 0; p < phases_.size(); ++p) {
      const size_t items = plan_->items()[p];
      for (size_t i = 0; i < threads_; ++i) {
        const size_t share = (me + i) % threads_;
        const size_t begin = share * items / threads_, end = (share + 1) * items / threads_;
        for (;;) {
          const size_t item = begin + phases_[p].shares[share].claimed.fetch_add(1, std::memory_order_relaxed);
          if (item >= end) break;
          run(p, item);
          phases_[p].finished.fetch_add(1, std::memory_order_acq_rel);
        }
      }
      wait(phases_[p].finished, items);
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<size_t> claimed{0};
  };
  struct alignas(64) Phase {
    std::atomic<size_t> finished{0};
    std::vector<Share> shares;
  };

  void run(size_t phase, size_t item) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      plan_->run(phase, item);
    } catch (const std::bad_alloc&) {
      failed_.store(true, std::memory_order_relaxed);
    }
  }

  // Items take microseconds, so another thread is soon done, unless it lost its processor: then yielding gives it this one,
  // and where the system has other plans, as with real-time priorities, sleeping does.
  static void wait(const std::atomic<size_t>& finished, size_t items) {
    for (size_t turn = 0; finished.load(std::memory_order_acquire) < items; ++turn) {
      if (turn > 20000) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      } else if (turn > 256) {
        std::this_thread::yield();
      }
    }
  }

  std::unique_ptr<Plan> plan_;
  size_t threads_;
  std::atomic<size_t> joined_{0};
  std::atomic<bool> failed_{false};
  std::vector<Phase> phases_;
};

// How many threads are worth waking besides the calling one. Where products follow one another, as in a model, the pool's
// threads still look for work when the next call comes: on two cores of Zen 4 two threads are faster than one from 5 to 8
// microseconds of work on, whatever its form. So each thread has to have at least this much.
inline size_t helpers_for(const Plan& plan, size_t threads) {
  constexpr double kWakeUp = 4e3;  // nanoseconds
  size_t items = 0;
  for (const size_t n : plan.items()) items = items < n ? n : items;
  const size_t affordable = static_cast<size_t>(plan.cost() / kWakeUp);
  const size_t most = items < affordable ? items : affordable;
  const size_t all = most < threads ? most : threads;
  return all > 1 ? all - 1 : 0;
}

}  // namespace upg
