/* A guest that needs no kernel: 32 bits, no paging, no interrupts, started by its PVH note.
 *
 * Each processor goes in rounds. In one it reads what the round before has left in its pages,
 * counts what is wrong there, writes the pattern of this one, and a page that nothing was in. The
 * first tells of it on the serial port, a line a round:
 *
 *   round errors clock flags armed features other-round other-errors other-armed
 *
 * all in hexadecimal: the clock is kvmclock's in ns, its flags, what is left of the timer that was
 * armed (its deadline), CPUID's features, and the same of the second processor, if it is there.
 * With the command line `crash` it ends, in its third round, where there is no memory to run from.
 */
typedef unsigned int u32;
typedef unsigned long long u64;

#define PAGES 64
#define WORDS 8
#define AREA 0x800000u   /* of the first processor: PAGES pages, and a new one each round */
#define STRIDE 0x200000u /* from there to the next one's */
#define APIC 0xfee00000u
#define TRAMPOLINE 0x8000u

/* The entry; and where the second processor comes from: 16 bits, at TRAMPOLINE. */
__asm__(".section .note.pvh, \"a\"\n"
        ".long 4, 4, 18\n.asciz \"Xen\"\n.long start\n"
        ".text\n.globl start\nstart: cli\n mov $stack0 + 4096, %esp\n push %ebx\n call first\n"
        ".globl wake, wake_end, table\n"
        ".code16\nwake: cli\n xor %ax, %ax\n mov %ax, %ds\n lgdtl 0x8000 + table - wake\n"
        " mov $0x11, %eax\n mov %eax, %cr0\n ljmpl $8, $flat\n"
        "table: .word 23\n .long gdt\nwake_end:\n"
        ".code32\nflat: mov $16, %eax\n mov %eax, %ds\n mov %eax, %es\n mov %eax, %ss\n"
        " mov $stack1 + 4096, %esp\n call second\n"
        ".balign 8\ngdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff\n");

char stack0[4096], stack1[4096];
extern const char wake[], wake_end[];

static struct { u32 version, pad; u64 tsc, time; u32 mul; signed char shift; unsigned char flags; }
    clock __attribute__((aligned(64)));
static u32 steal[16] __attribute__((aligned(64)));
static volatile struct { u32 round, errors; u64 armed; } done[2];

static void write_msr(u32 msr, u64 value) { __asm__ volatile("wrmsr" ::"c"(msr), "A"(value)); }
static u64 read_msr(u32 msr) { u64 v; __asm__ volatile("rdmsr" : "=A"(v) : "c"(msr)); return v; }
static u64 tsc(void) { u64 v; __asm__ volatile("rdtsc" : "=A"(v)); return v; }
static u32 apic(u32 at) { return *(volatile u32 *)(APIC + at); }
static void set_apic(u32 at, u32 value) { *(volatile u32 *)(APIC + at) = value; }

static u32 features(void) {
    u32 a = 1, b, c, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
    return c;
}

static void put(char c) {
    unsigned char ready;
    do __asm__ volatile("inb %%dx" : "=a"(ready) : "d"(0x3fd));
    while (!(ready & 0x20));
    __asm__ volatile("outb %%al, %%dx" ::"a"(c), "d"(0x3f8));
}

static void hex(u64 value, char end) {
    int at = 60;
    while (at && !(value >> at)) at -= 4;
    for (; at >= 0; at -= 4) put("0123456789abcdef"[(value >> at) & 15]);
    put(end);
}

static u64 now(void) {
    u64 delta = tsc() - clock.tsc;
    delta = clock.shift < 0 ? delta >> -clock.shift : delta << clock.shift;
    return clock.time + ((delta & 0xffffffff) * clock.mul >> 32) + (delta >> 32) * clock.mul;
}

static u32 pattern(u32 round, u32 page, u32 word) {
    return round ? round * 0x9e3779b1u + page * 0x85ebca6bu + word : 0;
}

static void go_round(u32 who) {
    volatile u32 *area = (u32 *)(AREA + who * STRIDE);
    u32 round = done[who].round + 1;
    for (u32 page = 0; page < PAGES; page++)
        for (u32 word = 0; word < WORDS; word++) {
            volatile u32 *at = area + page * 1024 + word;
            if (*at != pattern(round - 1, page, word)) done[who].errors++;
            *at = pattern(round, page, word);
        }
    area[(PAGES + round % 256) * 1024] = round;
    done[who].armed = read_msr(0x6e0);
    done[who].round = round;
}

static void arm(void) { /* one-shot at a time stamp, masked: nobody is to be interrupted */
    set_apic(0xf0, 0x1ff);
    set_apic(0x320, 0x50020);
    write_msr(0x6e0, tsc() + (1ull << 44));
}

void second(void) {
    arm();
    for (;;) go_round(1);
}

void first(const u32 *start_info) {
    const char *words = (const char *)start_info[6];
    write_msr(0x4b564d01, (u32)&clock | 1);
    write_msr(0x4b564d03, (u32)steal | 1);
    arm();
    for (u32 i = 0; i < (u32)(wake_end - wake); i++) ((char *)TRAMPOLINE)[i] = wake[i];
    if (*words == '2') { /* INIT, then two starts, as the manuals have it */
        static const u32 orders[] = {0xc4500, 0xc4600 | TRAMPOLINE >> 12, 0xc4600 | TRAMPOLINE >> 12};
        for (int i = 0; i < 3; i++) {
            set_apic(0x300, orders[i]);
            while (apic(0x300) & 0x1000);
        }
    }
    for (;;) {
        go_round(0);
        hex(done[0].round, ' '), hex(done[0].errors, ' '), hex(now(), ' ');
        hex(clock.flags, ' '), hex(done[0].armed, ' '), hex(features(), ' ');
        hex(done[1].round, ' '), hex(done[1].errors, ' '), hex(done[1].armed, '\n');
        if (*words == 'c' && done[0].round == 3) ((void (*)(void))0xd0000000)();
    }
}
