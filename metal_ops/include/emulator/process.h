// A kernel as a program: reads one dispatch from standard input, writes the buffers that kernels may write back to
// standard output. Every buffer has exactly its size, so that a sanitizer sees the first byte outside.
#pragma once
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "launch.h"

namespace msl {

inline void read_exactly(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::abort();
}

inline uint64_t read_number() {
  uint64_t number;
  read_exactly(&number, sizeof number);
  return number;
}

template <class Kernels> int serve(const Kernels& kernels) {
  std::string name(read_number(), '\0');
  read_exactly(name.data(), name.size());
  Launch l{};
  read_exactly(&l, sizeof l);
  struct Held { void* memory; size_t bytes; bool written; };
  std::vector<Held> held;
  for (uint64_t n = read_number(); n > 0; --n) {
    const uint64_t index = read_number();
    Held buffer{nullptr, read_number(), read_number() != 0};
    if (posix_memalign(&buffer.memory, 64, buffer.bytes)) std::abort();
    read_exactly(buffer.memory, buffer.bytes);
    l.buffers[index] = buffer.memory;
    held.push_back(buffer);
  }
  char error[1000] = "";
  launch(kernels, name.c_str(), l, error, sizeof error);
  const uint64_t length = std::strlen(error);
  std::fwrite(&length, sizeof length, 1, stdout);
  std::fwrite(error, 1, length, stdout);
  for (const Held& buffer : held) {
    if (buffer.written) std::fwrite(buffer.memory, 1, buffer.bytes, stdout);
    std::free(buffer.memory);
  }
  return 0;
}

}  // namespace msl

#define MSL_MAIN(kernels) \
  int main() { return msl::serve(kernels); }
