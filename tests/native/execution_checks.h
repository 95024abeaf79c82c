// What docs/native.md, "Threads", promises of any plan.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "execution.h"

namespace upg {

// Notes who ran which item when.
class NotingPlan : public Plan {
 public:
  struct Note {
    size_t phase, item;
    std::thread::id by;
  };
  using Meanwhile = std::function<void(size_t phase, size_t item)>;

  NotingPlan(std::vector<size_t> items, double cost, std::vector<Note>* notes, Meanwhile meanwhile = nullptr)
      : notes_(notes), meanwhile_(std::move(meanwhile)) {
    items_ = std::move(items);
    cost_ = cost;
  }
  void run(size_t phase, size_t item) const override {
    if (meanwhile_) meanwhile_(phase, item);
    const std::lock_guard<std::mutex> lock(mutex_);
    notes_->push_back({phase, item, std::this_thread::get_id()});
  }

 private:
  std::vector<Note>* notes_;
  Meanwhile meanwhile_;
  mutable std::mutex mutex_;
};

// `expect` takes a condition and what it means that it does not hold.
template <class Expect>
void check_execution(Expect expect) {
  using Notes = std::vector<NotingPlan::Note>;
  const std::vector<size_t> items = {7, 1, 40};
  const auto in_order = [](const Notes& notes, size_t phase) {
    std::vector<size_t> order;
    for (const auto& note : notes) {
      if (note.phase == phase) order.push_back(note.item);
    }
    return order;
  };
  const auto up_to = [](size_t n) {
    std::vector<size_t> all(n);
    for (size_t i = 0; i < n; ++i) all[i] = i;
    return all;
  };

  // Every item once, phase after phase, whatever turns up of however many threads.
  for (const size_t expected : {1, 2, 3, 64}) {
    for (const size_t turn_up : {1, 2, 5}) {
      Notes notes;
      const auto execution = std::make_shared<Execution>(std::make_unique<NotingPlan>(items, 0, &notes), expected);
      std::vector<std::thread> threads;
      for (size_t i = 1; i < turn_up; ++i) threads.emplace_back([execution] { execution->help(); });
      execution->work();
      for (std::thread& thread : threads) thread.join();
      execution->work();  // too late: nothing is left
      size_t phase = 0;
      for (const auto& note : notes) {
        expect(note.phase >= phase, "execution: an item ran before the phase before it was done");
        phase = note.phase;
      }
      for (size_t p = 0; p < items.size(); ++p) {
        std::vector<size_t> order = in_order(notes, p);
        if (expected == 1 && turn_up == 1) expect(order == up_to(items[p]), "execution: one thread goes in order");
        std::sort(order.begin(), order.end());
        expect(order == up_to(items[p]), "execution: every item runs exactly once");
      }
    }
  }

  // Two threads start at the beginning and in the middle, and go on from there: the second one runs all of its share
  // while the first one is kept at its first item.
  {
    Notes notes;
    std::promise<void> began, go_on;
    const auto execution = std::make_shared<Execution>(
        std::make_unique<NotingPlan>(std::vector<size_t>{40}, 0, &notes,
                                     [&](size_t, size_t item) {
                                       if (item == 0) {
                                         began.set_value();
                                         go_on.get_future().wait();
                                       }
                                       if (item == 19) go_on.set_value();
                                     }),
        2);
    std::thread first([execution] { execution->help(); });
    began.get_future().wait();
    execution->work();
    first.join();
    std::vector<size_t> order = in_order(notes, 0);
    order.erase(std::find(order.begin(), order.end(), size_t{0}));
    std::vector<size_t> shares;
    for (size_t i = 20; i < 40; ++i) shares.push_back(i);
    for (size_t i = 1; i < 20; ++i) shares.push_back(i);
    expect(order == shares, "execution: a thread takes consecutive items of its share, then the other shares");
  }

  // The calling thread returns when a helper's last item is done, not before, and needs no helper that never comes.
  {
    Notes notes;
    std::promise<void> running;
    const auto caller = std::this_thread::get_id();
    const auto execution = std::make_shared<Execution>(
        std::make_unique<NotingPlan>(std::vector<size_t>{2}, 0, &notes,
                                     [&](size_t, size_t) {
                                       if (std::this_thread::get_id() == caller) return;
                                       running.set_value();
                                       std::this_thread::sleep_for(std::chrono::milliseconds(50));
                                     }),
        8);
    std::thread helper([execution] { execution->help(); });
    running.get_future().wait();
    execution->work();
    expect(notes.size() == 2 && notes[1].by == helper.get_id(), "execution: the caller waits for what a helper runs");
    helper.join();
  }

  // Want of memory on any thread reaches the caller, once nobody runs an item any more; what is left is not run.
  for (const bool by_helper : {false, true}) {
    Notes notes;
    std::atomic<bool> failed{by_helper};
    const auto caller = std::this_thread::get_id();
    const auto execution = std::make_shared<Execution>(
        std::make_unique<NotingPlan>(items, 0, &notes,
                                     [&](size_t, size_t) {
                                       if ((std::this_thread::get_id() == caller) != by_helper) {
                                         failed = true;
                                         throw std::bad_alloc();
                                       }
                                       // The helper leaves an item to the caller.
                                       while (!failed) std::this_thread::yield();
                                     }),
        2);
    std::thread helper([execution] { execution->help(); });
    if (by_helper) helper.join();
    bool thrown = false;
    try {
      execution->work();
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    const size_t ran = notes.size();
    if (helper.joinable()) helper.join();
    expect(thrown && ran == notes.size(), "execution: the caller is told of want of memory");
    expect(in_order(notes, 1).empty() && in_order(notes, 2).empty(), "execution: a failure ends a plan");
  }

  // Helpers only where work is worth waking them, and one fewer than threads, as the caller works.
  const auto helpers = [](std::vector<size_t> phases, double cost, size_t threads) {
    return helpers_for(NotingPlan(std::move(phases), cost, nullptr), threads);
  };
  expect(helpers({100}, 1e3, 8) == 0, "execution: small work wakes nobody");
  expect(helpers({100}, 1e9, 1) == 0, "execution: a pool of one thread has no helper");
  expect(helpers({100}, 1e9, 8) == 7, "execution: large work uses every thread");
  expect(helpers({1, 3}, 1e9, 8) == 2, "execution: no more threads than items");
}

}  // namespace upg
