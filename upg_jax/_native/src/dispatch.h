// Which instruction set's kernels run: the best that the processor has, unless another is chosen.
#pragma once

#include <string_view>
#include <vector>

#include "kernels.h"

namespace upg {

// The kernels that this build has and this processor runs, best first; "portable" is always the last.
const std::vector<const Kernels*>& usable_kernels();

// The kernels in use; may be called from any thread.
const Kernels& kernels();

// Chooses kernels by name; false where they are not usable.
bool choose_kernels(std::string_view name);

}  // namespace upg
