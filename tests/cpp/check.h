// All that a check needs: a macro that counts failures and main's return value.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "moe.h"

inline int failures = 0;

// CHECK(condition, "printf text", arguments...) reports and goes on; the first 20 failures are printed.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++failures <= 20) {                       \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

inline int finish() {
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

// Runs body in a child process, which sees only what body does before its first call of a kernel.
template <class Body>
void in_child(const std::string& what, Body body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(600);  // a deadlock ends the child instead of the test run
    failures = 0;
    body();
    const int status = finish();
    std::fflush(stdout);
    _exit(status);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && status == 0, "%s ended with the status %d", what.c_str(),
        status);
}

// The instruction set is chosen once per process, so each one gets its own. Under ThreadSanitizer, which is
// slow, the best one stands for all: they share the code that starts and orders threads.
template <class Body>
void on_every_isa(Body body) {
  for (const std::string& isa : paddle_moe::cpu::available_isas()) {
    in_child(isa, [&] {
      setenv("PADDLE_MOE_ISA", isa.c_str(), 1);
      CHECK(isa == paddle_moe::cpu::isa_name(), "got %s", paddle_moe::cpu::isa_name());
      body();
    });
#if defined(__SANITIZE_THREAD__)
    break;
#endif
  }
}
