// Which build of the row kernels runs: the best that the processor has.
#include "csrc/cpu/kernels.h"

#include <atomic>
#include <cstring>

namespace mmpeft {

namespace isa_default {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace isa_avx2 {
extern const Kernels table;
}
namespace isa_avx512 {
extern const Kernels table;
}
namespace isa_avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

struct Choices {
  const Kernels* tables[5] = {};
  const char* names[5] = {};
  std::atomic<const Kernels*> chosen{nullptr};

  Choices() {
    int count = 0;
    tables[count++] = &isa_default::table;
#if defined(__x86_64__)
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) tables[count++] = &isa_avx2::table;
    if (avx512) tables[count++] = &isa_avx512::table;
    if (avx512 && __builtin_cpu_supports("avx512bf16")) tables[count++] = &isa_avx512_bf16::table;
#endif
    for (int i = 0; i < count; ++i) names[i] = tables[i]->name;
    chosen = tables[count - 1];
  }
};

Choices& choices() {
  static Choices instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return *choices().chosen; }

const char* const* instruction_sets() { return choices().names; }

bool use_instruction_set(const char* name) {
  for (const Kernels* table : choices().tables) {
    if (table && !strcmp(table->name, name)) {
      choices().chosen = table;
      return true;
    }
  }
  return false;
}

}  // namespace mmpeft
