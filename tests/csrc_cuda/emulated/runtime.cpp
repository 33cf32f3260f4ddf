// Fibers, barriers and late work of the emulated block.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace emulated {

Position position;

namespace {

constexpr int kStackBytes = 256 * 1024;
constexpr int kRoundsOfSleep = 64;

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  const char* waits_for = "nothing";
};

struct Meeting {
  std::vector<void*> handed_in;
  int arrived = 0;
  uint64_t generation = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
jmp_buf scheduler;
int running = -1;
int num_threads_of_block = 0;
const std::function<void()>* body_of_block = nullptr;
uint64_t progress = 0;  // grows whenever something happened that others may wait for
std::map<std::pair<int, int>, Meeting> meetings;  // by size and index of the first thread; barriers by -1 - id
std::map<int, std::list<std::function<void()>>> late_work;
std::mt19937 random_numbers(1);
alignas(1024) char shared_buffer[kSharedLimit + 2048];

void yield() {
  if (_setjmp(fibers[running]->resume) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  (*body_of_block)();
  fibers[running]->done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

void run_one_late() {
  for (auto& [queue, work] : late_work) {
    if (work.empty() || random_numbers() % 4 != 0) continue;
    auto chosen = work.begin();
    std::advance(chosen, random_numbers() % work.size());
    const auto run = *chosen;
    work.erase(chosen);
    run();
    ++progress;
  }
}

void run_block() {
  for (auto& fiber : fibers) fiber->started = fiber->done = false;
  int idle_rounds = 0;
  uint32_t sleeping_warps = 0;
  for (int round = 0, all_done = 0; all_done == 0; ++round) {
    // Warps run apart by more than a barrier allows, if one is missing.
    if (round % kRoundsOfSleep == 0) sleeping_warps = random_numbers() & random_numbers();
    const uint64_t before = progress;
    all_done = 1;
    for (int i = 0; i < num_threads_of_block; ++i) {
      Fiber& fiber = *fibers[i];
      if (fiber.done) continue;
      all_done = 0;
      if (sleeping_warps >> i / 32 & 1) continue;
      running = i;
      position.thread = {static_cast<unsigned>(i), 0, 0};
      if (_setjmp(scheduler) != 0) continue;
      if (fiber.started) _longjmp(fiber.resume, 1);
      fiber.started = true;
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.start, fiber_main, 0);
      setcontext(&fiber.start);
    }
    run_one_late();
    idle_rounds = progress == before ? idle_rounds + 1 : 0;
    if (idle_rounds > 1000) {
      for (int i = 0; i < num_threads_of_block; i += 32) {
        std::fprintf(stderr, "thread %d waits for %s\n", i, fibers[i]->done ? "nothing: done" : fibers[i]->waits_for);
      }
      std::abort();
    }
  }
  for (auto& [queue, work] : late_work) flush(queue);
  for (auto& [key, meeting] : meetings) {
    if (meeting.arrived == 0) continue;
    std::fprintf(stderr, "a block ended inside a collective of %d\n", key.first);
    std::abort();
  }
}

}  // namespace

void wait_until(const char* what, const std::function<bool()>& ready) {
  fibers[running]->waits_for = what;
  while (!ready()) yield();
  fibers[running]->waits_for = "nothing";
}

static void meet_at(Meeting& meeting, int size, int index, void* mine, const std::function<void(void**)>& work) {
  meeting.handed_in.resize(size);
  meeting.handed_in[index] = mine;
  ++progress;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.generation;
    work(meeting.handed_in.data());
    return;
  }
  const uint64_t generation = meeting.generation;
  wait_until("the other threads", [&] { return meeting.generation != generation; });
}

void meet(int size, void* mine, const std::function<void(void**)>& work) {
  meet_at(meetings[{size, running / size}], size, running % size, mine, work);
}

void barrier(int id, int count) {
  const int size = count == 0 ? num_threads_of_block : count;
  Meeting& meeting = meetings[{-1 - id, 0}];
  meet_at(meeting, size, meeting.arrived, nullptr, [](void**) {});
}

char* shared_memory() { return shared_buffer + 16; }

void later(int queue, std::function<void()> work) {
  late_work[queue].push_back(std::move(work));
  ++progress;
}

void flush(int queue) {
  for (auto& work : late_work[queue]) work();
  late_work[queue].clear();
  ++progress;
}

void run_grid(dim3 grid, int num_threads, int shared_bytes, const std::function<void()>& body) {
  if (shared_bytes > kSharedLimit) std::fprintf(stderr, "%d bytes of shared memory\n", shared_bytes), std::abort();
  while (static_cast<int>(fibers.size()) < num_threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack = std::make_unique<char[]>(kStackBytes);
  }
  num_threads_of_block = num_threads;
  body_of_block = &body;
  position.grid = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        position.block = {x, y, z};
        std::memset(shared_buffer, 0xFF, sizeof(shared_buffer));
        run_block();
      }
    }
  }
}

}  // namespace emulated
