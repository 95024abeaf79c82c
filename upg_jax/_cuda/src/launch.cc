// One XLA handler that launches any compiled kernel on XLA's stream. Everything about a launch is in the call's
// attributes, so that a saved program needs nothing of the process that made it: what a launch does not name by text is
// looked up here, and Python is asked for a kernel's machine code the first time a device needs it.
//
// The CUDA driver is loaded when first needed: building this takes no CUDA toolkit, loading it no GPU.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#define UPG_API extern "C" __attribute__((visibility("default")))

namespace {

namespace ffi = xla::ffi;

using Result = int;  // CUresult: 0 is success
using Context = struct CUctx_st*;
using Module = struct CUmod_st*;
using Function = struct CUfunc_st*;
using Stream = struct CUstream_st*;

constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76, kSharedMemory = 97;  // CUdevice_attribute
constexpr int kMaxDynamicSharedMemory = 8;                                           // CUfunction_attribute
constexpr int kRelaxedCapture = 2;                                                   // CUstreamCaptureMode

struct Driver {
  Result (*get_error_string)(Result, const char**);
  Result (*push_context)(Context);
  Result (*pop_context)(Context*);
  Result (*context_of)(Stream, Context*);
  Result (*device)(int*);
  Result (*attribute)(int*, int, int);
  Result (*load)(Module*, const void*);
  Result (*function)(Function*, Module, const char*);
  Result (*set_attribute)(Function, int, int);
  Result (*exchange_capture_mode)(int*);
  Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  std::string problem;

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) {
      problem = "the CUDA driver does not load";
      return;
    }
    find(library, "cuGetErrorString", get_error_string);
    find(library, "cuCtxPushCurrent_v2", push_context);
    find(library, "cuCtxPopCurrent_v2", pop_context);
    find(library, "cuStreamGetCtx", context_of);
    find(library, "cuCtxGetDevice", device);
    find(library, "cuDeviceGetAttribute", attribute);
    find(library, "cuModuleLoadData", load);
    find(library, "cuModuleGetFunction", function);
    find(library, "cuFuncSetAttribute", set_attribute);
    find(library, "cuThreadExchangeStreamCaptureMode", exchange_capture_mode);
    find(library, "cuLaunchKernel", launch);
  }

  template <typename F>
  void find(void* library, const char* name, F& function_pointer) {
    function_pointer = reinterpret_cast<F>(dlsym(library, name));
    if (function_pointer == nullptr) problem = std::string("the CUDA driver has no ") + name;
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

// Ends a handler with what the driver says.
struct DriverError {
  const char* what;
  Result code;
};

void expect(const char* what, Result code) {
  if (code != 0) throw DriverError{what, code};
}

struct Kernel {
  Function function;
  int multiprocessors;
};

// Python's: compiles a kernel for an architecture and hands its machine code to `upg_cuda_provide`.
using Compile = void (*)(const char* kernel, int major, int minor);

struct Code {
  std::string cubin;
  std::string problem;
};

// Why the last compilation on this thread gave nothing, where the next may give something.
thread_local std::string passing_problem;

struct Registry {
  std::shared_mutex mutex;
  Compile compile = nullptr;
  std::map<std::pair<std::string, int>, Code> code;             // by kernel and architecture
  std::map<std::pair<Context, std::string>, Kernel, std::less<>> kernels;
};

Registry& registry() {
  static auto* const made = new Registry;  // never destroyed: XLA may still run when the process ends
  return *made;
}

// The part of a kernel's text after its last slash is the entry point: "source/MACRO=1,OTHER=2/entry".
std::string entry_of(const std::string& kernel) { return kernel.substr(kernel.rfind('/') + 1); }

struct CompileError {
  std::string problem;
};

Kernel load(Context context, const std::string& name) {
  const Driver& d = driver();
  int device = 0, major = 0, minor = 0, memory = 0;
  Kernel kernel{};
  expect("cuCtxGetDevice", d.device(&device));
  expect("cuDeviceGetAttribute", d.attribute(&major, kMajor, device));
  expect("cuDeviceGetAttribute", d.attribute(&minor, kMinor, device));
  expect("cuDeviceGetAttribute", d.attribute(&memory, kSharedMemory, device));
  expect("cuDeviceGetAttribute", d.attribute(&kernel.multiprocessors, kMultiprocessors, device));
  Registry& r = registry();
  const auto key = std::make_pair(name, 10 * major + minor);
  Code code;
  for (int turn = 0; turn < 2; ++turn) {
    Compile compile = nullptr;
    {
      const std::shared_lock lock(r.mutex);
      const auto found = r.code.find(key);
      if (found != r.code.end()) {
        code = found->second;
        break;
      }
      compile = r.compile;
    }
    if (turn == 1 || compile == nullptr) {
      throw CompileError{passing_problem.empty() ? "nothing compiles it here" : passing_problem};
    }
    passing_problem.clear();
    compile(name.c_str(), major, minor);
  }
  if (!code.problem.empty()) throw CompileError{code.problem};
  // Loading is not allowed on a thread that captures a graph, unless it says that it knows what it does.
  int mode = kRelaxedCapture;
  expect("cuThreadExchangeStreamCaptureMode", d.exchange_capture_mode(&mode));
  Module module = nullptr;
  Result result = d.load(&module, code.cubin.data());
  if (result == 0) result = d.function(&kernel.function, module, entry_of(name).c_str());
  if (result == 0) result = d.set_attribute(kernel.function, kMaxDynamicSharedMemory, memory);
  d.exchange_capture_mode(&mode);
  expect("loading it", result);
  const std::unique_lock lock(r.mutex);
  r.kernels.emplace(std::make_pair(context, name), kernel);
  return kernel;
}

Kernel find(Context context, std::string_view name) {
  Registry& r = registry();
  auto key = std::make_pair(context, std::string(name));
  {
    const std::shared_lock lock(r.mutex);
    const auto found = r.kernels.find(key);
    if (found != r.kernels.end()) return found->second;
  }
  return load(context, key.second);
}

// Makes a context current while it lives.
class Current {
 public:
  explicit Current(Context context) { expect("cuCtxPushCurrent", driver().push_context(context)); }
  ~Current() {
    Context before = nullptr;
    driver().pop_context(&before);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

using Numbers = ffi::Span<const std::int32_t>;

// Launches `kernel` with pointers to `buffers` (operands, then results, by number), the struct `parameters` by value, and
// where in shared memory each of its pieces begins; the last number of `shared_memory` is how much there is. `grid` is
// threadgroups in x, y, z; where `resident` is not 0, at most so many in x for each multiprocessor.
ffi::Error launch(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results, std::string_view kernel,
                  Numbers buffers, Numbers parameters, Numbers shared_memory, Numbers grid, std::int32_t threads,
                  std::int32_t resident) {
  const std::string what = "upg_jax: " + std::string(kernel) + ": ";
  if (!driver().problem.empty()) return ffi::Error(ffi::ErrorCode::kUnavailable, what + driver().problem);
  if (grid.size() != 3 || shared_memory.size() == 0) return ffi::Error::InvalidArgument(what + "attributes are off");
  std::vector<void*> pointers;
  for (const std::int32_t i : buffers) {
    const auto n = static_cast<std::size_t>(i);
    if (n < operands.size()) {
      const auto operand = operands.get<ffi::AnyBuffer>(n);
      if (!operand.has_value()) return operand.error();
      pointers.push_back(operand->untyped_data());
    } else {
      auto result = results.get<ffi::AnyBuffer>(n - operands.size());
      if (!result.has_value()) return result.error();
      pointers.push_back((*result)->untyped_data());
    }
  }
  std::vector<std::int32_t> numbers(parameters.begin(), parameters.end());
  std::vector<std::int32_t> places(shared_memory.begin(), shared_memory.end() - 1);
  std::vector<void*> arguments;
  for (void*& pointer : pointers) arguments.push_back(&pointer);
  arguments.push_back(numbers.data());
  for (std::int32_t& place : places) arguments.push_back(&place);
  try {
    Context context = nullptr;
    expect("cuStreamGetCtx", driver().context_of(stream, &context));
    const Current current(context);
    const Kernel found = find(context, kernel);
    std::int32_t wide = grid[0];
    if (resident > 0) wide = std::min(wide, resident * found.multiprocessors);
    expect("cuLaunchKernel",
           driver().launch(found.function, static_cast<unsigned>(wide), static_cast<unsigned>(grid[1]),
                           static_cast<unsigned>(grid[2]), static_cast<unsigned>(threads), 1, 1,
                           static_cast<unsigned>(*(shared_memory.end() - 1)), stream, arguments.data(), nullptr));
  } catch (const DriverError& error) {
    const char* text = nullptr;
    driver().get_error_string(error.code, &text);
    return ffi::Error::Internal(what + error.what + ": " + (text == nullptr ? "unknown error" : text));
  } catch (const CompileError& error) {
    return ffi::Error(ffi::ErrorCode::kUnavailable, what + error.problem);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(upg_cuda_launch, launch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("kernel")
                                  .Attr<Numbers>("buffers")
                                  .Attr<Numbers>("parameters")
                                  .Attr<Numbers>("shared_memory")
                                  .Attr<Numbers>("grid")
                                  .Attr<std::int32_t>("threads")
                                  .Attr<std::int32_t>("resident"),
                              {ffi::Traits::kCmdBufferCompatible});

// What Python calls through ctypes.
UPG_API int upg_ffi_api_major() { return XLA_FFI_API_MAJOR; }
UPG_API int upg_ffi_api_minor() { return XLA_FFI_API_MINOR; }
UPG_API void* upg_cuda_handler() { return reinterpret_cast<void*>(upg_cuda_launch); }

UPG_API void upg_cuda_set_compiler(Compile compile) {
  Registry& r = registry();
  const std::unique_lock lock(r.mutex);
  r.compile = compile;
}

// A kernel's machine code for an architecture, or why there is none: now, or for good.
UPG_API void upg_cuda_provide(const char* kernel, int major, int minor, const char* cubin, size_t size,
                              const char* problem, int for_good) {
  if (for_good == 0) {
    passing_problem = problem;
    return;
  }
  Registry& r = registry();
  const std::unique_lock lock(r.mutex);
  r.code[std::make_pair(std::string(kernel), 10 * major + minor)] = {std::string(cubin, size), problem};
}
