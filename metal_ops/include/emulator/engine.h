// Runs threadgroups: a lane runs until it must wait for others, at a simdgroup operation or a barrier.
//
// A lane that never waits costs a function call: one fibre runs lane after lane and is given up to a lane only when that
// lane waits. What real hardware leaves undefined is an error here: a simdgroup operation that not every lane reaches,
// or that lanes reach at different lines, and a barrier that not every thread reaches.
#pragma once
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "fibre.h"

namespace msl {

using uint = unsigned;
struct Size { uint x, y, z; };
struct Arguments { void* buffers[31]; void* threadgroup_memory[31]; };
using Function = void (*)(const Arguments&);

constexpr uint kWidth = 32;
constexpr uint kMaxThreads = 1024;
constexpr size_t kMaxThreadgroupMemory = 32 << 10;

// Where in a Metal source something happened.
struct Place {
  const char* operation;
  const char* file;
  int line;
  bool operator==(const Place& other) const { return line == other.line && !std::strcmp(file, other.file); }
  std::string text() const { return std::string(operation) + " at " + file + ":" + std::to_string(line); }
};

// A simdgroup: bit masks of lanes by what they do.
struct Simdgroup {
  uint32_t all = 0, fresh = 0, ready = 0, in_operation = 0, at_barrier = 0, done = 0;
  uint serial = 0;  // operations so far; their values alternate between two sets
  Place place{};
  uint64_t values[2][kWidth], results[2][kWidth];
};

struct Engine {
  Function function = nullptr;
  const Arguments* arguments = nullptr;
  bool reverse = false;
  Size threads{}, groups{}, group{};
  uint count = 0;  // threads of the threadgroup
  unsigned long serial = 0;  // threadgroups so far
  size_t threadgroup_bytes = 0;
  std::string error;

  std::vector<Simdgroup> simdgroups;
  uint current = 0;  // simdgroup that runs
  uint done = 0, at_barrier = 0;
  Place barrier{};
  Fibre main;
  Fibre* running = nullptr;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Fibre*> of_lane, idle;
};

inline Engine& engine() {
  static thread_local Engine one;
  return one;
}

inline uint first_of(uint32_t lanes, bool reverse) {
  return static_cast<uint>(reverse ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes));
}

void run_lanes();

inline Fibre& idle_fibre(Engine& e) {
  if (e.idle.empty()) {
    e.fibres.push_back(std::make_unique<Fibre>(run_lanes, static_cast<uint>(e.fibres.size())));
    return *e.fibres.back();
  }
  Fibre& fibre = *e.idle.back();
  e.idle.pop_back();
  return fibre;
}

// The fibre that is to run next in the current simdgroup; the thread's own where every lane waits.
inline Fibre& next_fibre(Engine& e) {
  Simdgroup& s = e.simdgroups[e.current];
  if (s.ready) {
    const uint lane = first_of(s.ready, e.reverse);
    s.ready &= ~(1u << lane);
    return *e.of_lane[e.current * kWidth + lane];
  }
  return s.fresh ? idle_fibre(e) : e.main;
}

inline void leave(Engine& e, Fibre& self) {
  Fibre& next = next_fibre(e);
  if (&next == &self) return;
  e.running = &next;
  switch_to(self, next);
}

// Gives up the threadgroup. The fibres are then in the midst of it, so the launcher drops them all.
[[noreturn]] inline void fail(const std::string& rule) {
  Engine& e = engine();
  if (e.error.empty()) e.error = rule;
  switch_to(*e.running, e.main);
  std::abort();
}

inline std::string name_of(uint lane) {
  return "lane " + std::to_string(lane % kWidth) + " of simdgroup " + std::to_string(lane / kWidth);
}

inline void run_lanes() {
  Engine& e = engine();
  Fibre& self = *e.running;
  arrived(self, &e.main);
  for (;;) {
    Simdgroup* s = &e.simdgroups[e.current];
    while (s->fresh) {
      const uint lane = first_of(s->fresh, e.reverse);
      s->fresh &= ~(1u << lane);
      self.lane = e.current * kWidth + lane;
      e.of_lane[self.lane] = &self;
      e.function(*e.arguments);
      s->done |= 1u << lane;
      ++e.done;
      if (s->in_operation) fail(name_of(self.lane) + " returned while others wait in " + s->place.text());
    }
    e.idle.push_back(&self);
    leave(e, self);
  }
}

// A simdgroup operation: every lane brings a value, and the last to arrive computes all results.
template <class Compute>
[[gnu::noinline]] uint64_t collective(uint64_t value, Place place, Compute compute) {
  Engine& e = engine();
  Fibre& self = *e.running;
  const uint lane = self.lane % kWidth;
  Simdgroup& s = e.simdgroups[self.lane / kWidth];
  const uint set = s.serial & 1;
  if (s.done) fail(place.text() + " in " + name_of(self.lane) + " after other lanes returned");
  if (s.at_barrier) fail(place.text() + " in " + name_of(self.lane) + " while others wait in " + e.barrier.text());
  if (!s.in_operation) {
    s.place = place;
  } else if (!(s.place == place)) {
    fail(name_of(self.lane) + " in " + place.text() + " while others wait in " + s.place.text());
  }
  s.values[set][lane] = value;
  s.in_operation |= 1u << lane;
  if (s.in_operation == s.all) {
    ++s.serial;
    s.ready = s.all & ~(1u << lane);
    s.in_operation = 0;
    compute(s.values[set], s.results[set], static_cast<uint>(__builtin_popcount(s.all)));
  } else {
    leave(e, self);
  }
  return s.results[set][lane];
}

[[gnu::noinline]] inline void barrier(Place place) {
  Engine& e = engine();
  Fibre& self = *e.running;
  Simdgroup& s = e.simdgroups[self.lane / kWidth];
  if (s.in_operation) fail(name_of(self.lane) + " in " + place.text() + " while others wait in " + s.place.text());
  if (e.done) fail(place.text() + " is not reached by every thread: some returned");
  if (e.at_barrier && !(e.barrier == place)) {
    fail(name_of(self.lane) + " in " + place.text() + " while others wait in " + e.barrier.text());
  }
  e.barrier = place;
  s.at_barrier |= 1u << self.lane % kWidth;
  ++e.at_barrier;
  leave(e, self);
}

inline void run_simdgroup(Engine& e, uint i) {
  Simdgroup& s = e.simdgroups[i];
  e.current = i;
  while (e.error.empty() && (s.fresh | s.ready)) {
    e.running = &next_fibre(e);
    switch_to(e.main, *e.running);
  }
}

// Runs one threadgroup; e.error says what went wrong.
inline void run_group(Engine& e) {
  const uint simdgroups = (e.count + kWidth - 1) / kWidth;
  e.simdgroups.assign(simdgroups, Simdgroup{});
  e.of_lane.assign(simdgroups * kWidth, nullptr);
  e.done = e.at_barrier = 0;
  ++e.serial;
  for (uint i = 0; i < simdgroups; ++i) {
    const uint lanes = std::min(kWidth, e.count - i * kWidth);
    e.simdgroups[i].all = e.simdgroups[i].fresh = lanes == kWidth ? ~0u : (1u << lanes) - 1;
  }
  for (;;) {
    for (uint i = 0; i < simdgroups && e.error.empty(); ++i) run_simdgroup(e, e.reverse ? simdgroups - 1 - i : i);
    if (!e.error.empty() || e.done == e.count) return;
    if (e.at_barrier != e.count) {
      e.error = e.barrier.text() + " is not reached by every thread";
      return;
    }
    e.at_barrier = 0;
    for (Simdgroup& s : e.simdgroups) {
      s.ready = s.at_barrier;
      s.at_barrier = 0;
    }
  }
}

// An array in threadgroup memory, declared in a kernel: every threadgroup finds it full of NaN.
inline void begin_array(void* memory, size_t bytes, unsigned long& seen) {
  Engine& e = engine();
  if (seen == e.serial) return;
  seen = e.serial;
  e.threadgroup_bytes += bytes;
  if (e.threadgroup_bytes > kMaxThreadgroupMemory) {
    fail(std::to_string(e.threadgroup_bytes) + " bytes of threadgroup memory; at most 32768 are allowed");
  }
  std::memset(memory, 0xff, bytes);
}

}  // namespace msl
