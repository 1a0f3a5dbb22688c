// A child process may use the kernels after its parent did, though it has none of the parent's threads.
#include "check.h"
#include "layer.h"

#if defined(__SANITIZE_THREAD__)
int main() {
  std::printf("left out: ThreadSanitizer does not support threads in a child of a process that had some\n");
  return 0;
}
#else
int main() {
  Random random(1);
  const Layer layer(random, 20, 400, 200, 6, 2, paddle_moe::DType::kFloat32, Layout::kList, false);
  for (int round = 0; round < 3; ++round) {
    CHECK(count_differences(layer, run(layer, 3)) == 0, "parent, round %d", round);
    in_child("the child", [&] {
      for (int num_threads : {3, 1, 4})
        CHECK(count_differences(layer, run(layer, num_threads)) == 0, "child");
      in_child("the grandchild", [&] { CHECK(count_differences(layer, run(layer, 2)) == 0, "grandchild"); });
    });
  }
  return finish();
}
#endif
