// What calls a kernel: its arguments, its place in the grid, the grid.
#pragma once
#include <atomic>
#include <cstdio>
#include <thread>
#include <tuple>

#include "engine.h"
#include "types.h"

namespace msl {

template <class F> struct Types;
template <class... A> struct Types<void(A...)> {
  template <int i> using At = std::tuple_element_t<i, std::tuple<A...>>;
};
template <class T> struct Cast;
template <class T> struct Cast<T*> { static T* from(void* p) { return static_cast<T*>(p); } };
template <class T> struct Cast<T&> { static T& from(void* p) { return *static_cast<T*>(p); } };

template <class T> inline T attribute(Size v) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(v.x);
  } else if constexpr (std::is_constructible_v<T, uint, uint, uint>) {
    using E = decltype(T().x);
    return T(static_cast<E>(v.x), static_cast<E>(v.y), static_cast<E>(v.z));
  } else {
    using E = decltype(T().x);
    return T(static_cast<E>(v.x), static_cast<E>(v.y));
  }
}

inline Size at(uint flat, Size size) { return {flat % size.x, flat / size.x % size.y, flat / size.x / size.y}; }
inline uint lane() { return engine().running->lane; }
inline Size threads_per_threadgroup() { return engine().threads; }
inline Size threadgroups_per_grid() { return engine().groups; }
inline Size threadgroup_position_in_grid() { return engine().group; }
inline Size thread_position_in_threadgroup() { return at(lane(), engine().threads); }
inline Size threads_per_grid() {
  const Engine& e = engine();
  return {e.groups.x * e.threads.x, e.groups.y * e.threads.y, e.groups.z * e.threads.z};
}
inline Size thread_position_in_grid() {
  const Engine& e = engine();
  const Size t = thread_position_in_threadgroup();
  return {e.group.x * e.threads.x + t.x, e.group.y * e.threads.y + t.y, e.group.z * e.threads.z + t.z};
}
inline Size thread_index_in_threadgroup() { return {lane(), 0, 0}; }
inline Size thread_index_in_simdgroup() { return {lane() % kWidth, 0, 0}; }
inline Size simdgroup_index_in_threadgroup() { return {lane() / kWidth, 0, 0}; }
inline Size simdgroups_per_threadgroup() { return {(engine().count + kWidth - 1) / kWidth, 0, 0}; }
inline Size threads_per_simdgroup() { return {kWidth, 0, 0}; }

struct Entry { const char* name; Function function; };

// The fields that metal_ops/_emulator.py fills.
struct Launch {
  void* buffers[31];
  size_t threadgroup_memory[31];
  uint groups[3];
  uint threads[3];
  uint os_threads;
  uint reverse;
};

class Launcher {
 public:
  Launcher(Function function, const Launch& launch) : function_(function), launch_(launch) {}

  // Returns what went wrong, or nothing.
  std::string run() {
    const uint* g = launch_.groups;
    total_ = static_cast<uint64_t>(g[0]) * g[1] * g[2];
    std::vector<std::thread> others;
    for (uint i = 1; i < launch_.os_threads && i < total_; ++i) others.emplace_back([this] { work(); });
    work();
    for (std::thread& other : others) other.join();
    return error_;
  }

 private:
  void work() {
    Engine& e = engine();
    std::vector<std::unique_ptr<char[]>> memory;
    size_t bytes = 0;
    Arguments arguments{};
    std::memcpy(arguments.buffers, launch_.buffers, sizeof launch_.buffers);
    for (uint i = 0; i < 31; ++i) {
      if (!launch_.threadgroup_memory[i]) continue;
      memory.emplace_back(new char[launch_.threadgroup_memory[i]]);
      arguments.threadgroup_memory[i] = memory.back().get();
      bytes += launch_.threadgroup_memory[i];
    }
    e.function = function_;
    e.arguments = &arguments;
    e.reverse = launch_.reverse != 0;
    e.threads = {launch_.threads[0], launch_.threads[1], launch_.threads[2]};
    e.groups = {launch_.groups[0], launch_.groups[1], launch_.groups[2]};
    e.count = e.threads.x * e.threads.y * e.threads.z;
    for (uint64_t i; !failed_ && (i = next_++) < total_;) {
      e.group = at(static_cast<uint>(e.reverse ? total_ - 1 - i : i), e.groups);
      e.threadgroup_bytes = bytes;
      for (uint k = 0; k < 31; ++k) {
        if (arguments.threadgroup_memory[k]) std::memset(arguments.threadgroup_memory[k], 0xff, launch_.threadgroup_memory[k]);
      }
      run_group(e);
      if (!e.error.empty()) report(e);
    }
  }

  void report(Engine& e) {
    if (!failed_.exchange(true)) {
      error_ = "threadgroup (" + std::to_string(e.group.x) + ", " + std::to_string(e.group.y) + ", " +
               std::to_string(e.group.z) + "): " + e.error;
    }
    e.error.clear();
    e.idle.clear();
    e.fibres.clear();
  }

  Function function_;
  const Launch& launch_;
  uint64_t total_ = 0;
  std::atomic<uint64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::string error_;
};

template <class Kernels> int launch(const Kernels& kernels, const char* name, const Launch& launch, char* error, size_t size) {
  for (const Entry& entry : kernels) {
    if (std::strcmp(entry.name, name)) continue;
    const std::string found = Launcher(entry.function, launch).run();
    std::snprintf(error, size, "%s", found.c_str());
    return found.empty() ? 0 : 1;
  }
  std::snprintf(error, size, "no such kernel");
  return 1;
}

}  // namespace msl
