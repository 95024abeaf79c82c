// Runs the fuzz target without libFuzzer, for compilers that lack it: random inputs for some seconds, or given files.
//
//   upg_fuzz -max_total_time=SECONDS | upg_fuzz FILE...
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

std::vector<std::uint8_t> random_input(std::mt19937& rng) {
  std::vector<std::uint8_t> input(rng() % 6000);
  // Small bytes make short gaps, long rows, and entries that stay inside the matrix.
  const unsigned most = 1u << (1 + rng() % 8);
  for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(rng() % 16 ? rng() % most : rng());
  if (input.size() > 40) {
    for (std::size_t i = 0; i < 40; ++i) input[i] = static_cast<std::uint8_t>(rng());  // sizes and row pointers
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  const char option[] = "-max_total_time=";
  int seconds = 10;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], option, sizeof option - 1) == 0) {
      seconds = std::atoi(argv[i] + sizeof option - 1);
    } else if (argv[i][0] != '-') {
      std::ifstream file(argv[i], std::ios::binary);
      const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
      LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
      seconds = 0;
    }
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  std::mt19937 rng(20240229);
  std::size_t count = 0;
  for (; std::chrono::steady_clock::now() < end; ++count) {
    const std::vector<std::uint8_t> input = random_input(rng);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%zu random inputs: ok\n", count);
  return 0;
}
