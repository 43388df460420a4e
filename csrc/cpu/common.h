// Everything that the kernels include. It comes before a kernel file raises the instruction set, so that inline library
// code, which the linker may share between files, stays portable.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "arena.h"
#include "kernels.h"
