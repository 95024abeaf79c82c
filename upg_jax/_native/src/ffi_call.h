// Running a plan inside one of XLA's calls.
#pragma once

#include <memory>
#include <new>
#include <utility>

#include "execution.h"
#include "xla/ffi/api/ffi.h"

namespace upg {

// The calling thread works too, and stays the one that goes on with the program: the pool's threads then stay ready for
// the next operation.
inline xla::ffi::Error execute(std::unique_ptr<Plan> plan, xla::ffi::ThreadPool& pool) {
  const size_t helpers = helpers_for(*plan, static_cast<size_t>(pool.num_threads()));
  if (helpers == 0) {
    Execution(std::move(plan), 1).work();
    return xla::ffi::Error::Success();
  }
  const auto execution = std::make_shared<Execution>(std::move(plan), helpers + 1);
  try {
    for (size_t i = 0; i < helpers; ++i) pool.Schedule([execution] { execution->help(); });
  } catch (const std::bad_alloc&) {
    // Those that were asked may be at work already; with them, or alone, this thread can do it all.
  }
  execution->work();
  return xla::ffi::Error::Success();
}

template <auto kHandler>
struct Guarded;

// What every handler is called through: XLA knows no exceptions, so that want of memory would end the process.
template <class... Args, xla::ffi::Error (*kHandler)(Args...)>
struct Guarded<kHandler> {
  static xla::ffi::Error call(Args... args) {
    try {
      return kHandler(std::move(args)...);
    } catch (const std::bad_alloc&) {
      return {xla::ffi::ErrorCode::kResourceExhausted, "upg_jax: out of memory"};
    }
  }
};

}  // namespace upg
