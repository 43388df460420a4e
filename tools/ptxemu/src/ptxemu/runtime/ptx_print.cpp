// Device printf and assert.
#include <cstdio>

#include "ptx_internal.h"

namespace ptx {

u32 device_printf(Thread* t, u64 format, u64 arguments) {
  (void)t;
  const char* f = (const char*)format;
  const u8* next = (const u8*)arguments;
  u64 position = 0;
  std::string out;
  char piece[512];
  while (*f) {
    if (*f != '%') { out += *f++; continue; }
    std::string spec(1, *f++);
    bool wide = false;
    while (*f && !strchr("diouxXeEfFgGaAcspn%", *f)) {
      wide |= *f == 'l' || *f == 'z' || *f == 'j' || *f == 't';
      if (!strchr("lhzjt", *f)) spec += *f;
      f++;
    }
    char type = *f ? *f++ : '%';
    if (type == '%') { out += '%'; continue; }
    bool eight = wide || strchr("eEfFgGaAsp", type);
    position = (position + (eight ? 7 : 3)) & ~(eight ? 7ull : 3ull);
    if (strchr("eEfFgGaA", type)) snprintf(piece, sizeof piece, (spec + type).c_str(), load<double>(next + position));
    else if (type == 's') snprintf(piece, sizeof piece, (spec + 's').c_str(), (const char*)load<u64>(next + position));
    else if (type == 'p') snprintf(piece, sizeof piece, "%p", (void*)load<u64>(next + position));
    else if (eight) snprintf(piece, sizeof piece, (spec + "ll" + type).c_str(), load<u64>(next + position));
    else snprintf(piece, sizeof piece, (spec + type).c_str(), load<u32>(next + position));
    position += eight ? 8 : 4;
    out += piece;
  }
  fputs(out.c_str(), stdout);
  fflush(stdout);
  return 0;
}

void device_assert(Thread* t, u64 message, u64 file, u32 line, u64 function, int instr) {
  fail(t, kTrap, instr, 0, 0, "assertion `%s' failed in %s at %s:%u", (const char*)message, (const char*)function,
       (const char*)file, line);
}

}  // namespace ptx
