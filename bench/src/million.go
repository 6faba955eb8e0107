// Goroutines that hold 200 bytes each and wait for a message of their own: see million.rs.
package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

func available() float64 {
	f, _ := os.Open("/proc/meminfo")
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if strings.HasPrefix(s.Text(), "MemAvailable:") {
			kib, _ := strconv.ParseFloat(strings.Fields(s.Text())[1], 64)
			return kib * 1024
		}
	}
	return 0
}

func waits(seed uint64, woken chan uint64, done chan uint64) {
	held := make([]byte, 200)
	for i := range held {
		held[i] = byte(seed >> (i % 40))
	}
	n := <-woken
	for _, b := range held {
		n += uint64(b)
	}
	done <- n
}

func main() {
	tasks, _ := strconv.Atoi(os.Args[1])
	before := available()
	begun := time.Now()
	all := make([]chan uint64, tasks)
	done := make(chan uint64, 1024)
	for i := range all {
		all[i] = make(chan uint64)
		go waits(uint64(i), all[i], done)
	}
	time.Sleep(time.Millisecond)
	made := float64(tasks) / time.Since(begun).Seconds()
	time.Sleep(time.Second)
	each := (before - available()) / float64(tasks)
	begun = time.Now()
	go func() {
		for _, c := range all {
			c <- 1
		}
	}()
	for range all {
		<-done
	}
	fmt.Printf("%f\n%f\n%f\n", each, made, float64(tasks)/time.Since(begun).Seconds())
}
